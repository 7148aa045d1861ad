# SPDX-License-Identifier: Apache-2.0
"""CLIP, SigLIP and Chinese-CLIP releases inward, in the layouts of three libraries."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from m2jax.checkpoint.convert import (
    cn_clip,
    dual_check,
    dual_files,
    dual_tensors,
    hf_config,
    inward,
    json_files,
    open_clip_config,
    place,
)
from m2jax.checkpoint.convert.dual_names import IGNORED
from m2jax.config import UserError
from m2jax.config_dual import Dual
from m2jax.data.image import Preprocess
from m2jax.models import params as params_lib


class Described(NamedTuple):
    """What the files beside the weights say."""

    config: Dual
    layout: str
    preprocess: Preprocess


def read(request: inward.Request) -> inward.Imported:
    """Reads and places a model of the CLIP family.

    Raises:
        UserError: the weights do not fit their config or the family asked for, no config is
            found, or the tokenizer cannot be read.
    """
    file = request.weights.file
    tensors = _tensors(request.weights.content, str(file))
    told = _describe(tensors, request.arch, file)
    dtype = request.dtype or inward.narrowest(tensors, str(file))
    cfg = dataclasses.replace(told.config, param_dtype=dtype)
    pieces = dual_tensors.pieces(tensors, cfg, told.layout, str(file), request.allow_missing)
    tokenizer = _tokenizer(request.tokenizer or file.parent, cfg, told.layout, request)
    model = params_lib.abstract(cfg)
    places = inward.layout(model, math.gcd(cfg.vision.width, cfg.text.width), request.mesh)
    params = place.place(model, places, pieces, fresh=functools.partial(inward.fresh, cfg, places))
    notes = [f"{cfg.family}, layout {told.layout}, parameters {dtype}, {len(tensors)} tensors"]
    if tokenizer is None:
        notes.append("no tokenizer: texts must come as ids; --tokenizer DIR adds one")
    return inward.Imported(
        cfg,
        params,
        tokenizer,
        told.preprocess,
        tuple(notes),
        lambda: dual_check.run(tensors, cfg, told.layout, params, tokenizer),
    )


def _tensors(content: Mapping[str, Any], where: str) -> dict[str, np.ndarray]:
    """The tensors of a file, out of a training checkpoint's wrappings, buffers left out."""
    inner = content.get("state_dict", content)
    if not isinstance(inner, Mapping):
        raise UserError(f"{where}: state_dict is no mapping: save the model's state_dict alone")
    prefix = "module." if inner and all(str(name).startswith("module.") for name in inner) else ""
    found = {}
    for name, value in inner.items():
        name = str(name).removeprefix(prefix)
        if IGNORED.fullmatch(name):
            continue
        if not isinstance(value, np.ndarray):
            raise UserError(f"{where}: {name} is no tensor: save the model's state_dict alone")
        found[name] = value
    return found


def _describe(tensors: Mapping[str, np.ndarray], arch: str, file: Path) -> Described:
    """Config and preprocessing, from the files that go with these tensor names."""
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    named = Path(arch) if arch.endswith(".json") else None
    if any(name.startswith(("vision_model.", "text_model.")) for name in tensors):
        path = named or file.parent / "config.json"
        steps_path = file.parent / "preprocessor_config.json"
        steps = json_files.read(steps_path)
        cfg = hf_config.read(_config(path), steps, str(path))
        told = Described(cfg, "hf", dual_files.hf_preprocess(steps, cfg, str(steps_path)))
    elif cn_clip.is_ours(shapes):
        cfg = cn_clip.infer(shapes, str(file))
        told = Described(cfg, "open-clip", Preprocess(cfg.vision.image_size))
    else:
        path = named or file.parent / "open_clip_config.json"
        values = _config(path)
        cfg = open_clip_config.read(values, str(path))
        steps = values.get("preprocess_cfg", {})
        made = dual_files.open_clip_preprocess(steps, cfg, str(path))
        told = Described(cfg, "open-clip", made)
    if named is None and arch != cfg.family:
        raise UserError(f"--arch {arch}: these weights are {cfg.family}: say --arch {cfg.family}")
    return told


def _config(path: Path) -> dict[str, Any]:
    """A config file that must be there: the weights alone do not tell heads and activations."""
    if not path.is_file():
        raise UserError(
            f"{path}: no such file, and the weights alone do not tell the model: copy it there, or "
            "name it with --arch FILE.json"
        )
    return json_files.read(path)


def _tokenizer(
    directory: Path, cfg: Dual, layout: str, request: inward.Request
) -> dual_files.Made | None:
    """The tokenizer in a folder; one that was asked for must be there and fit."""
    made = dual_files.tokenizer(directory, cfg, layout)
    if made is None and request.tokenizer is not None:
        raise UserError(
            f"{directory}: holds no tokenizer (spiece.model, tokenizer.json, vocab.json, vocab.txt)"
        )
    if made is not None and made.vocab_size > cfg.text.vocab_size:
        raise UserError(
            f"{directory}: its tokenizer has {made.vocab_size:,} tokens but the model embeds "
            f"{cfg.text.vocab_size:,}: name that of this model with --tokenizer DIR"
        )
    return made
