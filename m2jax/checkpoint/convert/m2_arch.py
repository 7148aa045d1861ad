# SPDX-License-Identifier: Apache-2.0
"""The official release's config keys, and what they say in ours.

Source: alipay/Ant-Multi-Modal-Framework e7b7dc7, prj/M2_Encoder (vlmo/config.py, configs/*.json).
Missing keys take the values of the released 0.4B model (spec section 1).
"""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from m2jax import architectures
from m2jax import config as config_lib
from m2jax.config import UserError

_SIZES: Mapping[str, str] = types.MappingProxyType(  # official key -> field of config.Model
    {
        "encoder_embed_dim": "width",
        "encoder_attention_heads": "heads",
        "encoder_layers": "backbone_layers",
        "beit3_vl_layers": "vl_layers",
        "out_embed_dim": "out_dim",
        "image_size": "image_size",
        "patch_size": "patch_size",
        "vocab_size": "vocab_size",
        "max_text_len": "max_text_len",
    }
)
MAX_TEXT_LEN = 1022  # the release's position table has 1024 rows, two of them unused
_HEADS = types.MappingProxyType({"base": 12, "large": 16, "huge": 32})  # by beit_version
_NAMES = types.MappingProxyType({"0.4b": "base", "1b": "large", "10b": "huge"})

# Keys that would change the function, and the only value that this model has.
_FIXED: Mapping[str, Any] = types.MappingProxyType(
    {
        "share_layer": False,
        "share_attn": False,
        "one_attn": False,
        "deepnorm": False,
        "mask_ratio": 0,
        "reclip_image_size": None,
        "video_num_frm": None,
        "num_frames": 1,
    }
)
# Keys about training, data and logging: the features do not depend on them.
_WITHOUT_EFFECT = frozenset(
    """
    exp_name seed datasets loss_names batch_size deepnorm_init train_transform_keys
    val_transform_keys draw_false_image image_only text_only tokenizer_model codebook_size
    codebook_dim visual_mask_size visual_mask_num lang vqav2_label_size max_text_len_of_initckpt
    tokenizer_type tokenizer whole_word_masking mlm_prob draw_false_text mvlm_prob cap_onlytext
    split_data_for_imagemlm itc_mask aggregate_nodes model_arch drop_path_rate get_recall_metric
    get_recall_rerank_metric get_zeroshot_metric get_muge_feat get_f30k_feat k_test resume_from
    fast_dev_run val_check_interval test_only use_sharded_training resume_during_training
    save_top_k every_n_train_steps log_metric_steps use_pcache pcache_root gpu_env data_root
    log_dir per_gpu_batchsize num_gpus num_nodes load_path num_workers precision local_run
    flash_attn deepspeed_config coalesce_backbone mask_data communication_benchmark
    checkpoint_activations single_cap random_one itc_feats_name itc_distill itc_distill_dim
    itc_teacher_weights mup base_encoder_embed_dim delta_encoder_embed_dim
    mup_encoder_attention_heads base_encoder_ffn_embed_dim delta_encoder_ffn_embed_dim
    atorch_config compile_op optimizer_state_shard_save model_state_shard_save local_loss
    use_dual_softmax model_path modelscope model_file
    """.split()
)


class Architecture(NamedTuple):
    """A model's sizes, and what its file said in vain."""

    model: config_lib.Model  # resolved
    without_effect: tuple[str, ...]  # official keys that were read and not needed


def read(arch: str) -> Architecture:
    """The architecture that ``--arch`` names.

    Args:
        arch: one of ``architectures.ARCHITECTURES``, or a JSON file with the release's own keys.

    Raises:
        UserError: no such name or file, an unknown key, or a value that this model cannot have.
    """
    if arch in architectures.ARCHITECTURES:
        return Architecture(config_lib.resolve(config_lib.Model(name=arch)), ())
    if not arch.endswith(".json"):
        names = ", ".join(architectures.ARCHITECTURES)
        raise UserError(f"--arch {arch}: no such architecture: use one of {names} or a .json file")
    try:
        values = json.loads(Path(arch).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--arch {arch}: {error.strerror}: check the path") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"--arch {arch}: not a JSON file ({error}): mend it") from None
    if not isinstance(values, dict):
        raise UserError(f"--arch {arch}: holds no JSON object: write the release's config keys")
    return from_official(values, f"--arch {arch}")


def from_official(values: Mapping[str, Any], where: str) -> Architecture:
    """The architecture that official keys describe; ``where`` names them in errors.

    Raises:
        UserError: an unknown key, or a value that this model cannot have.
    """
    sizes: dict[str, int] = {}
    without_effect = []
    for key, value in values.items():
        if key in _SIZES:
            most = MAX_TEXT_LEN if key == "max_text_len" else architectures.LIMITS[_SIZES[key]]
            if type(value) is not int or not 0 < value <= most:
                raise UserError(
                    f"{where}: {key} is {value!r}: give a whole number above 0, at most {most:,}"
                )
            sizes[_SIZES[key]] = value
        elif key in _FIXED:
            if value != _FIXED[key]:
                raise UserError(
                    f"{where}: {key} is {value!r}: this model is only ever {_FIXED[key]!r}: "
                    "use the official code for it"
                )
        elif key in _WITHOUT_EFFECT:
            without_effect.append(key)
        elif key != "beit_version":
            raise UserError(f"{where}: {key}: no key of the release: remove it")
    version = values.get("beit_version", "base")
    if not isinstance(version, str) or version not in _HEADS:
        raise UserError(f"{where}: beit_version is {version!r}: use one of {', '.join(_HEADS)}")
    heads = {"heads": _HEADS[version]} if "heads" not in sizes else {}
    model = config_lib.Model(name="m2-encoder-0.4b", **(sizes | heads))  # type: ignore[arg-type]
    model = dataclasses.replace(model, name=_name(config_lib.resolve(model)))
    return Architecture(config_lib.resolve(model), tuple(without_effect))


def to_official(model: config_lib.Model) -> dict[str, Any]:
    """The official keys of a model; ``from_official`` is the inverse."""
    sizes = {key: getattr(model, field) for key, field in _SIZES.items()}
    version = _NAMES.get(model.name.removeprefix("m2-encoder-"), "base")
    return {"beit_version": version, **sizes}


def _name(model: config_lib.Model) -> str:
    """The published model that has these sizes; 0.4B's, whose defaults they began as, if none."""
    for name, sizes in architectures.ARCHITECTURES.items():
        if all(getattr(model, key) == value for key, value in sizes.items()):
            return name
    return model.name
