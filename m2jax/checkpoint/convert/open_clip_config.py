# SPDX-License-Identifier: Apache-2.0
"""``open_clip_config.json``, in and out: CLIP on open_clip's own towers, SigLIP on timm's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from m2jax.checkpoint.convert.keys import check_keys, numbers, same_function
from m2jax.config import UserError
from m2jax.config_dual import Dual, Text, Tower, Vision, check

_MODEL = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text"}
_VISION = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "no_ln_pre", "pool_type"}
_TIMM = {"timm_model_name", "timm_pool", "timm_proj", "image_size"}
_TEXT = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "pool_type"}
_READ = {
    "model_cfg": _MODEL,
    "vision_cfg": _VISION | _TIMM | {"act_kwargs", "norm_kwargs"},
    "text_cfg": _TEXT | {"act_kwargs", "norm_kwargs", "no_causal_mask", "proj_bias", "eos_id"},
}
# Keys that change the function unless they have this value (open_clip's own defaults).
_FIXED = {
    "ls_init_value": None,
    "attentional_pool": False,
    "pos_embed_type": "learnable",
    "final_ln_after_pool": False,
    "block_type": None,
    "qk_norm": False,
    "scaled_cosine_attn": False,
    "scale_heads": False,
    "scale_attn_inner": False,
    "scale_attn": False,
    "scale_fc": False,
    "embed_cls": False,
    "proj_type": "linear",
    "hf_model_name": None,
    "nonscalar_logit_scale": False,
    "timm_proj_bias": False,
}
_IDLE = {
    *("init_logit_scale", "init_logit_bias", "output_tokens", "patch_dropout", "pad_id"),
    *("attn_pooler_queries", "attn_pooler_heads", "timm_model_pretrained", "timm_drop"),
    *("timm_drop_path", "hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode"),
    *("hf_model_pretrained", "hf_proj_type", "hf_pooler_type", "hf_tokenizer_kwargs"),
}


class Trunk(NamedTuple):
    """Sizes of the timm models that SigLIP releases name."""

    width: int
    layers: int
    heads: int
    mlp_width: int


TRUNKS: Mapping[str, Trunk] = {
    "base": Trunk(768, 12, 12, 3072),
    "large": Trunk(1024, 24, 16, 4096),
    "so400m": Trunk(1152, 27, 16, 4304),
    "giantopt": Trunk(1536, 40, 16, 6144),
}
# timm gives these the tanh approximation of GELU, and the exact one to the others (timm 1.0.31).
_TANH = re.compile(
    r"vit_(base_patch32_siglip_256|large_patch16_siglip_512|so400m_patch16_siglip_\d+"
    r"|giantopt_patch16_siglip_\d+)"
)
_TRUNK_NAME = re.compile(rf"vit_({'|'.join(TRUNKS)})_patch(\d+)_siglip_(\d+)")


def is_ours(config: Mapping[str, Any]) -> bool:
    """Whether a JSON object looks like ``open_clip_config.json``."""
    return isinstance(config.get("model_cfg"), Mapping)


def family(config: Mapping[str, Any]) -> str:
    """The family of an ``open_clip_config.json``: timm's vision models are SigLIP's here."""
    vision = config["model_cfg"].get("vision_cfg")
    timm = isinstance(vision, Mapping) and vision.get("timm_model_name") is not None
    return "siglip" if timm else "clip"


def read(config: Mapping[str, Any], where: str) -> Dual:
    """The config of a release.

    Args:
        config: its ``open_clip_config.json``.
        where: the file, for errors.

    Raises:
        UserError: a key that would change the function, another vision model, or sizes that do
            not fit.
    """
    model = config.get("model_cfg")
    parts = (model.get("vision_cfg"), model.get("text_cfg")) if isinstance(model, Mapping) else ()
    if not isinstance(model, Mapping) or not all(isinstance(part, Mapping) for part in parts):
        raise UserError(f"{where}: no model_cfg with vision_cfg and text_cfg: restore the config")
    vision, text = model["vision_cfg"], model["text_cfg"]
    for name, part in (("model_cfg", model), ("vision_cfg", vision), ("text_cfg", text)):
        at = f"{where}: {name}"
        check_keys(part, read=_READ[name], fixed=_FIXED, idle=_IDLE, where=at)
    pre = config.get("preprocess_cfg", {})
    timm = family(config) == "siglip"
    if not timm and text.get("proj_bias"):
        raise UserError(f"{where}: text_cfg.proj_bias: only with a SigLIP vision model")
    try:
        cfg = Dual(
            family="siglip" if timm else "clip",
            vision=_trunk(vision, pre, where) if timm else _vision(model, vision, pre, where),
            text=_text(model, text, where),
            out_dim=model["embed_dim"],
            logit_bias=timm,
        )
    except KeyError as error:
        raise UserError(f"{where}: no {error.args[0]!r}: restore the config") from None
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{where}: a value of the wrong type ({error}): restore it") from None
    return check(cfg, where)


def write(cfg: Dual, preprocess: Mapping[str, Any]) -> dict[str, Any]:
    """The ``open_clip_config.json`` of a model; inverse of ``read``.

    Args:
        cfg: the model.
        preprocess: ``resize_mode`` and ``interpolation`` as open_clip calls them.

    Raises:
        UserError: open_clip has no model of this function.
    """
    text = {
        "context_length": cfg.text.positions,
        "vocab_size": cfg.text.vocab_size,
        "width": cfg.text.width,
        "heads": cfg.text.heads,
        "layers": cfg.text.layers,
        "mlp_ratio": _ratio(cfg.text),
        "no_causal_mask": not cfg.text.causal,
        "pool_type": cfg.text.pooling,
        "eos_id": cfg.text.eos_id,
        "proj_bias": cfg.text.head_bias,
        "norm_kwargs": {"eps": cfg.text.eps},
    }
    model = {"embed_dim": cfg.out_dim, "text_cfg": text}
    if cfg.family == "siglip":
        text |= _act(cfg.text.activation)
        model |= {"custom_text": True, "init_logit_bias": -10, "vision_cfg": _named_trunk(cfg)}
    else:
        model["quick_gelu"] = cfg.vision.activation == "quick_gelu"
        text |= _act(cfg.text.activation)
        model["vision_cfg"] = {
            "image_size": cfg.vision.image_size,
            "patch_size": cfg.vision.patch_size,
            "layers": cfg.vision.layers,
            "width": cfg.vision.width,
            "head_width": cfg.vision.width // cfg.vision.heads,
            "mlp_ratio": _ratio(cfg.vision),
            "no_ln_pre": not cfg.vision.pre_norm,
            "norm_kwargs": {"eps": cfg.vision.eps},
            **_act(cfg.vision.activation),
        }
    pre = {"mean": list(cfg.vision.mean), "std": list(cfg.vision.std), **preprocess}
    config = {"model_cfg": model, "preprocess_cfg": pre}
    if not same_function(read(config, "export"), cfg):
        raise UserError(
            f"export open-clip: its towers cannot hold this {cfg.family} model (timm's "
            f"{model['vision_cfg'].get('timm_model_name', 'ViT')} differs): use --format hf"
        )
    return config


def _vision(model: Mapping[str, Any], vision: Mapping[str, Any], pre: Any, where: str) -> Vision:
    """open_clip's own vision transformer."""
    layers = vision.get("layers", 12)
    if not isinstance(layers, int):
        raise UserError(f"{where}: vision_cfg.layers={layers!r}: a ResNet: only ViTs are supported")
    if vision.get("pool_type", "tok") != "tok":
        raise UserError(f"{where}: vision_cfg.pool_type: only 'tok' is supported")
    width = vision.get("width", 768)
    return Vision(
        width=width,
        layers=layers,
        heads=width // vision.get("head_width", 64),
        mlp_width=int(width * vision.get("mlp_ratio", 4.0)),
        activation=_activation(model, vision, where),
        eps=_eps(vision, where),
        image_size=vision.get("image_size", 224),
        patch_size=vision.get("patch_size", 16),
        pre_norm=not vision.get("no_ln_pre", False),
        **_normalisation(pre),
    )


def _trunk(vision: Mapping[str, Any], pre: Any, where: str) -> Vision:
    """The timm vision transformer of SigLIP."""
    name = vision["timm_model_name"]
    known = _TRUNK_NAME.fullmatch(name)
    if not known or (vision.get("timm_pool"), vision.get("timm_proj")) != ("map", "none"):
        raise UserError(
            f"{where}: timm_model_name={name!r}: only vit_*_patch*_siglip_* with timm_pool map "
            "and timm_proj none are supported"
        )
    return Vision(
        **TRUNKS[known[1]]._asdict(),
        activation="gelu_tanh" if _TANH.fullmatch(name) else "gelu",
        eps=1e-6,
        image_size=int(known[3]),
        patch_size=int(known[2]),
        patch_bias=True,
        pre_norm=False,
        pooling="map",
        projection=False,
        **_normalisation(pre),
    )


def _named_trunk(cfg: Dual) -> dict[str, Any]:
    """The vision_cfg of a SigLIP model, by the timm name of its sizes."""
    vision = cfg.vision
    sizes = Trunk(vision.width, vision.layers, vision.heads, vision.mlp_width)
    names = [name for name, trunk in TRUNKS.items() if trunk == sizes]
    if not names:
        raise UserError(
            "export open-clip: timm has no SigLIP model of these sizes: use --format hf"
        )
    return {
        "timm_model_name": f"vit_{names[0]}_patch{vision.patch_size}_siglip_{vision.image_size}",
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
        "image_size": vision.image_size,
    }


def _text(model: Mapping[str, Any], text: Mapping[str, Any], where: str) -> Text:
    """open_clip's own text transformer."""
    width = text.get("width", 512)
    return Text(
        width=width,
        layers=text.get("layers", 12),
        heads=text.get("heads", 8),
        mlp_width=int(width * text.get("mlp_ratio", 4.0)),
        activation=_activation(model, text, where),
        eps=_eps(text, where),
        vocab_size=text.get("vocab_size", 49408),
        positions=text.get("context_length", 77),
        causal=not text.get("no_causal_mask", False),
        pooling=text.get("pool_type", "argmax"),
        eos_id=text.get("eos_id", 2),
        head_bias=text.get("proj_bias", False),
    )


def _ratio(tower: Tower) -> float:
    """A ratio that open_clip's ``int(width * ratio)`` takes to the MLP's width."""
    ratio = tower.mlp_width / tower.width
    exact = int(tower.width * ratio) == tower.mlp_width
    return ratio if exact else (tower.mlp_width + 0.5) / tower.width


def _activation(model: Mapping[str, Any], part: Mapping[str, Any], where: str) -> str:
    """What open_clip builds: quick_gelu for the whole model, or GELU with a tower's own form."""
    given, quick = part.get("act_kwargs") or {}, model.get("quick_gelu", False)
    if given not in ({}, {"approximate": "tanh"}, {"approximate": "none"}) or (quick and given):
        raise UserError(f"{where}: act_kwargs={given!r}: only approximate of GELU is supported")
    if quick:
        return "quick_gelu"
    return "gelu_tanh" if given.get("approximate") == "tanh" else "gelu"


def _act(activation: str) -> dict[str, Any]:
    return {"act_kwargs": {"approximate": "tanh"}} if activation == "gelu_tanh" else {}


def _eps(part: Mapping[str, Any], where: str) -> float:
    given = part.get("norm_kwargs") or {}
    if set(given) - {"eps"}:
        raise UserError(f"{where}: norm_kwargs={given!r}: only eps is supported")
    return float(given.get("eps", 1e-5))


def _normalisation(pre: Any) -> dict[str, Any]:
    """Mean and standard deviation; open_clip's default is OpenAI's, for SigLIP too."""
    given = pre if isinstance(pre, Mapping) else {}
    mean, std = given.get("mean", Vision.mean), given.get("std", Vision.std)
    return {"mean": numbers(mean), "std": numbers(std)}
