# SPDX-License-Identifier: Apache-2.0
"""Tokenizer and preprocessing files of CLIP, SigLIP and Chinese-CLIP releases."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m2jax.checkpoint.convert import json_files
from m2jax.config import UserError
from m2jax.config_dual import Dual
from m2jax.data import hf_text
from m2jax.data.image import Preprocess, Resample
from m2jax.data.siglip_text import SiglipTokenizer
from m2jax.data.text import Tokenizer

Made = SiglipTokenizer | hf_text.FastTokenizer

CHINESE_LENGTH = 52  # tokens; cn_clip's context_length, whatever the position table holds
RESAMPLE: Mapping[int, Resample] = dict(  # by PIL's numbers
    enumerate(("nearest", "lanczos", "bilinear", "bicubic"))
)
_STEPS = ("do_resize", "do_rescale", "do_normalize")


def tokenizer(directory: Path, cfg: Dual, layout: str) -> Made | None:
    """The tokenizer of a release, from whichever of its files is there.

    Args:
        directory: holds ``spiece.model``, ``tokenizer.json``, ``vocab.json`` with ``merges.txt``,
            or ``vocab.txt``.
        cfg: the model.
        layout: ``hf`` or ``open-clip``: they pad and clean texts differently.

    Returns:
        ``None`` when the directory holds none of these files.

    Raises:
        UserError: a damaged file, or a library that is not installed.
    """
    length = cfg.text.positions
    if cfg.family == "siglip" and (directory / "spiece.model").is_file():
        model = (directory / "spiece.model").read_bytes()
        return SiglipTokenizer(model, length, underscore=" " if layout == "open-clip" else "")
    rules = _rules(directory)
    if rules is None:
        return None
    settings = json_files.read(directory / "tokenizer_config.json")
    if cfg.family == "chinese-clip":
        pad = hf_text.token_id(rules, "[PAD]", str(directory))
        return hf_text.FastTokenizer(rules, min(CHINESE_LENGTH, length), pad)
    if cfg.family == "siglip":
        rules = hf_text.cleaned(rules, punctuation=layout == "hf")
        pad = hf_text.token_id(rules, _token(settings, "<pad>"), str(directory))
        return hf_text.FastTokenizer(rules, length, pad)
    pad = hf_text.token_id(rules, _token(settings, hf_text.END_TEXT), str(directory))
    return hf_text.FastTokenizer(rules, length, pad if layout == "hf" else 0)


def _rules(directory: Path) -> str | None:
    """The text of a ``tokenizer.json``, made from older files where there is none."""
    if (directory / "tokenizer.json").is_file():
        return hf_text.read_text(directory / "tokenizer.json")
    if (directory / "vocab.json").is_file():
        return hf_text.clip_rules(directory / "vocab.json", directory / "merges.txt")
    if (directory / "vocab.txt").is_file():
        settings = json_files.read(directory / "tokenizer_config.json")
        return hf_text.bert_rules(
            directory / "vocab.txt", lower=bool(settings.get("do_lower_case", True))
        )
    return None


def _token(settings: Mapping[str, Any], default: str) -> str:
    """The padding token of a ``tokenizer_config.json``: a string, or an object with one."""
    token = settings.get("pad_token") or default
    return str(token.get("content", default)) if isinstance(token, Mapping) else str(token)


def hf_preprocess(config: Mapping[str, Any], cfg: Dual, where: str) -> Preprocess:
    """Preprocessing by a ``preprocessor_config.json``; empty: the family's own.

    Raises:
        UserError: a step or size that would give other pixels than this model takes.
    """
    size = cfg.vision.image_size
    if not config:
        return Preprocess(size, shortest=size if cfg.family == "clip" else 0)
    for step in _STEPS:
        if config.get(step, True) is not True:
            raise UserError(f"{where}: {step}={config[step]!r}: only true is supported")
    factor, number = config.get("rescale_factor", 1 / 255), config.get("resample", 3)
    if not isinstance(factor, float) or abs(factor - 1 / 255) > 1e-9:
        raise UserError(f"{where}: rescale_factor={factor!r}: expected 1/255")
    if type(number) is not int or number not in RESAMPLE:
        raise UserError(f"{where}: resample={number!r}: use one of {list(RESAMPLE)}")
    by_shorter, resized = _sizes(config.get("size", {"shortest_edge": size}), where)
    cropped = config.get("do_center_crop", cfg.family == "clip")
    final = _sizes(config.get("crop_size", resized), where)[1] if cropped else resized
    if final != size or (not cropped if by_shorter else resized != size):
        raise UserError(
            f"{where}: gives images of {final} pixels, the model takes {size} x {size}: "
            "use the files of one release"
        )
    return Preprocess(size, resample=RESAMPLE[number], shortest=resized if by_shorter else 0)


def _sizes(value: Any, where: str) -> tuple[bool, int]:
    """(by the shorter side?, pixels) of the forms a size is written in."""
    if type(value) is int:
        return True, value
    if isinstance(value, Mapping):
        pair = (value.get("height"), value.get("width"))
        if type(value.get("shortest_edge")) is int:
            return True, value["shortest_edge"]
        if type(pair[0]) is int and pair[0] == pair[1]:
            return False, pair[0]
    raise UserError(f"{where}: size {value!r}: expected one number, or equal height and width")


def open_clip_preprocess(config: Any, cfg: Dual, where: str) -> Preprocess:
    """Preprocessing by the ``preprocess_cfg`` of an ``open_clip_config.json``.

    Raises:
        UserError: a way to resize that is not supported.
    """
    if not isinstance(config, Mapping):
        raise UserError(f"{where}: preprocess_cfg is no group of keys: restore the config")
    size = cfg.vision.image_size
    mode = config.get("resize_mode", "shortest")
    resample = config.get("interpolation", "bicubic")
    if mode not in ("shortest", "squash") or resample not in ("bicubic", "bilinear"):
        raise UserError(
            f"{where}: resize_mode={mode!r}, interpolation={resample!r}: only shortest or squash, "
            "bicubic or bilinear are supported"
        )
    if mode == "squash":
        return Preprocess(size, resample=resample)
    return Preprocess(size, resample=resample, shortest=size, cut="even")


def hf_preprocess_config(pre: Preprocess, cfg: Dual) -> dict[str, Any]:
    """The ``preprocessor_config.json`` of a model; inverse of ``hf_preprocess``.

    It has no key for ``cut``: transformers rounds half an odd margin down.
    """
    numbers = {name: number for number, name in RESAMPLE.items()}
    names = {"clip": "CLIP", "siglip": "Siglip", "chinese-clip": "ChineseCLIP"}
    square = {"height": pre.size, "width": pre.size}
    config = {
        "image_processor_type": f"{names[cfg.family]}ImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "do_center_crop": pre.shortest > 0,
        "do_rescale": True,
        "do_normalize": True,
        "rescale_factor": 1 / 255,
        "resample": numbers[pre.resample],
        "size": {"shortest_edge": pre.shortest} if pre.shortest else square,
        "image_mean": list(cfg.vision.mean),
        "image_std": list(cfg.vision.std),
    }
    return config | ({"crop_size": square} if pre.shortest else {})


def open_clip_preprocess_config(pre: Preprocess) -> dict[str, Any]:
    """The resizing half of a ``preprocess_cfg``; inverse of ``open_clip_preprocess``."""
    mode = "shortest" if pre.shortest else "squash"
    return {"resize_mode": mode, "interpolation": pre.resample}


def write_tokenizer(directory: Path, made: Tokenizer | None) -> None:
    """Writes the files that transformers, and open_clip through it, read a tokenizer from."""
    settings: dict[str, Any] = {"padding_side": "right"}
    if isinstance(made, SiglipTokenizer):
        (directory / "spiece.model").write_bytes(made.model)
        settings |= {"tokenizer_class": "SiglipTokenizer", "model_max_length": made.max_len}
    elif isinstance(made, hf_text.FastTokenizer):
        (directory / "tokenizer.json").write_text(made.rules, encoding="utf-8")
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": made.pad_token}
        settings["model_max_length"] = made.max_len
    else:
        return
    json_files.write(directory / "tokenizer_config.json", settings)
