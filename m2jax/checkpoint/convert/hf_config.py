# SPDX-License-Identifier: Apache-2.0
"""``config.json`` of transformers' CLIPModel, SiglipModel and ChineseCLIPModel, in and out.

A release leaves out what equals the library's default, so the defaults are part of the format; they
are those of transformers 5.23. A key that is unknown is refused by name: it might change the
function.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from m2jax.checkpoint.convert.keys import check_keys, numbers, same_function
from m2jax.config import UserError
from m2jax.config_dual import Dual, Text, Vision, check

# model_type -> family. SigLIP 2 of a fixed resolution is published as "siglip".
FAMILIES = {"clip": "clip", "siglip": "siglip", "chinese_clip": "chinese-clip"}
CLASSES = {"clip": "CLIPModel", "siglip": "SiglipModel", "chinese-clip": "ChineseCLIPModel"}
ACTIVATIONS = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}

# What a config that leaves a key out means: the keys that are read, by part and family.
_BASE = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
_CLIP = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_SIGLIP = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
_BERT = {"hidden_act": "gelu", "layer_norm_eps": 1e-12}
_VISION: Mapping[str, dict[str, Any]] = {
    "clip": _BASE | _CLIP | {"image_size": 224, "patch_size": 32},
    "siglip": _BASE | _SIGLIP | {"image_size": 224, "patch_size": 16},
    "chinese-clip": _BASE | _CLIP | {"image_size": 224, "patch_size": 32},
}
_SMALL = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
_TEXT: Mapping[str, dict[str, Any]] = {
    "clip": _BASE
    | _CLIP
    | _SMALL
    | {"vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 49407},
    "siglip": _BASE
    | _SIGLIP
    | {"vocab_size": 32000, "max_position_embeddings": 64, "projection_size": None},
    "chinese-clip": _BASE
    | _BERT
    | {"vocab_size": 30522, "max_position_embeddings": 512, "type_vocab_size": 2},
}
# Keys that change the function unless they have this value.
_FIXED = {
    "num_channels": 3,
    "vision_use_head": True,
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "pruned_heads": {},
    "chunk_size_feed_forward": 0,
    "tie_encoder_decoder": False,
}
# Keys without effect on inference: training, generation and bookkeeping of the library.
_IDLE = frozenset(
    """
    architectures model_type torch_dtype dtype transformers_version _name_or_path
    initializer_factor initializer_range logit_scale_init_value use_cache attention_dropout
    dropout hidden_dropout_prob attention_probs_dropout_prob classifier_dropout pad_token_id
    bos_token_id eos_token_id sep_token_id pooler_fc_size pooler_num_attention_heads
    pooler_num_fc_layers pooler_type pooler_size_per_head directionality output_past
    gradient_checkpointing text_config_dict vision_config_dict id2label label2id num_labels
    problem_type finetuning_task task_specific_params output_attentions output_hidden_states
    return_dict torchscript use_bfloat16 decoder_start_token_id tokenizer_class prefix
    is_encoder_decoder tf_legacy_loss do_sample max_length min_length early_stopping num_beams
    num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty
    length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores return_dict_in_generate forced_bos_token_id
    forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens tie_word_embeddings projection_dim vision_config text_config
    _attn_implementation_autoset logit_bias_init_value
    """.split()
)


def read(config: Mapping[str, Any], normalisation: Mapping[str, Any], where: str) -> Dual:
    """The config of a release.

    Args:
        config: its ``config.json``.
        normalisation: its ``preprocessor_config.json`` (``image_mean`` and ``image_std`` are read);
            empty for the library's defaults.
        where: the file, for errors.

    Raises:
        UserError: another model, a key that would change the function, or sizes that do not fit.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(f"{where}: model_type {kind!r}: use one of {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    check_keys(config, read=(), fixed=_FIXED, idle=_IDLE, where=where)
    vision = _part(config, "vision_config", _VISION[family], where)
    text = _part(config, "text_config", _TEXT[family], where)
    siglip = family == "siglip"
    mean = (0.5, 0.5, 0.5) if siglip else Vision.mean
    std = (0.5, 0.5, 0.5) if siglip else Vision.std
    out_dim = (
        text["projection_size"] or text["hidden_size"]
        if siglip
        else config.get("projection_dim", 512)
    )
    cfg = Dual(
        family=family,
        vision=Vision(
            **_tower(vision, where),
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            patch_bias=siglip,
            pre_norm=not siglip,
            pooling="map" if siglip else "cls",
            projection=not siglip,
            mean=numbers(normalisation.get("image_mean", mean)),
            std=numbers(normalisation.get("image_std", std)),
        ),
        text=_text(family, text, where),
        out_dim=out_dim,
        logit_bias=siglip,
    )
    return check(cfg, where)


def write(cfg: Dual) -> dict[str, Any]:
    """The ``config.json`` of a model; inverse of ``read``, every key spelt out.

    Raises:
        UserError: transformers has no class for this function.
    """
    vision, text = _written(cfg.vision), _written(cfg.text)
    vision |= {"image_size": cfg.vision.image_size, "patch_size": cfg.vision.patch_size}
    text |= {
        "vocab_size": cfg.text.vocab_size,
        "max_position_embeddings": cfg.text.positions,
    }
    if cfg.family == "clip":
        text["eos_token_id"] = cfg.text.eos_id if cfg.text.pooling == "eos" else 2  # 2: argmax
    elif cfg.family == "siglip":
        text["projection_size"] = cfg.out_dim
    else:
        text["type_vocab_size"] = cfg.text.token_types
    kinds = {family: kind for kind, family in FAMILIES.items()}
    config = {
        "architectures": [CLASSES[cfg.family]],
        "model_type": kinds[cfg.family],
        "projection_dim": cfg.out_dim,
        "vision_config": vision,
        "text_config": text,
    }
    if cfg.family == "siglip":
        del config["projection_dim"]
    pre = {"image_mean": cfg.vision.mean, "image_std": cfg.vision.std}
    if not same_function(read(config, pre, "export"), cfg):
        raise UserError(
            f"export hf: {CLASSES[cfg.family]} cannot hold this model: use --format open-clip"
        )
    return config


def _text(family: str, text: Mapping[str, Any], where: str) -> Text:
    """The text tower of one family."""
    eos = text.get("eos_token_id", 0)
    shared = _tower(text, where) | {
        "vocab_size": text["vocab_size"],
        "positions": text["max_position_embeddings"],
    }
    if family == "siglip":
        return Text(**shared, causal=False, pooling="last", head_bias=True)
    if family == "chinese-clip":
        types = text["type_vocab_size"]
        return Text(
            **shared, causal=False, masked=True, pooling="first", token_types=types, post_norm=True
        )
    if type(eos) is not int:
        raise UserError(f"{where}: text_config.eos_token_id={eos!r}: expected one number")
    # transformers pools at the largest id where a config has the historic, wrong eos_token_id 2.
    return Text(**shared, pooling="argmax" if eos == 2 else "eos", eos_id=eos)


def _tower(part: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields every tower has."""
    if part["hidden_act"] not in ACTIVATIONS:
        raise UserError(
            f"{where}: hidden_act={part['hidden_act']!r}: use one of {', '.join(ACTIVATIONS)}"
        )
    return {
        "width": part["hidden_size"],
        "layers": part["num_hidden_layers"],
        "heads": part["num_attention_heads"],
        "mlp_width": part["intermediate_size"],
        "activation": ACTIVATIONS[part["hidden_act"]],
        "eps": part["layer_norm_eps"],
    }


def _written(tower: Vision | Text) -> dict[str, Any]:
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    return {
        "hidden_size": tower.width,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "intermediate_size": tower.mlp_width,
        "hidden_act": names[tower.activation],
        "layer_norm_eps": tower.eps,
        **({"num_channels": 3} if isinstance(tower, Vision) else {}),
    }


def _part(
    config: Mapping[str, Any], name: str, defaults: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """One sub-config over the library's defaults, each value of the default's type."""
    given, where = config.get(name, {}), f"{where}: {name}"
    historic = config.get(f"{name}_dict") or {}  # wins over the group in transformers
    if not isinstance(given, Mapping) or not isinstance(historic, Mapping):
        raise UserError(f"{where}: no group of keys: restore the config")
    if any(given.get(key, value) != value for key, value in historic.items()):
        raise UserError(f"{where}: {name}_dict says otherwise: leave one of the two in the file")
    given = {**historic, **given}
    check_keys(given, read=defaults, fixed=_FIXED, idle=_IDLE, where=where)
    merged = dict(defaults) | {key: value for key, value in given.items() if key in defaults}
    for key, default in defaults.items():
        value = merged[key]
        wanted = (int, type(None)) if default is None else type(default)
        if isinstance(default, float) and type(value) is int:
            merged[key] = float(value)
        elif not isinstance(value, wanted) or isinstance(value, bool):
            raise UserError(f"{where}.{key}={value!r}: expected a value like {default!r}")
    return merged
