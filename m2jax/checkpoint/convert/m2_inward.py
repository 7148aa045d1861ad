# SPDX-License-Identifier: Apache-2.0
"""Official M2-Encoder checkpoints, and our own exports of that format, inward."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from m2jax import config as config_lib
from m2jax.checkpoint.convert import (
    inward,
    json_files,
    m2_arch,
    m2_check,
    m2_layout,
    place,
)
from m2jax.checkpoint.convert.m2_names import slots
from m2jax.config import UserError
from m2jax.data import glm
from m2jax.data.image import Preprocess
from m2jax.data.text import Tokenizer, tokenizer_from_dict
from m2jax.models import params as params_lib

TOKENIZER = "m2jax_tokenizer.json"  # in our exports of models whose tokenizer is not GLM's
PREPROCESS = "preprocessor_config.json"  # in our exports


def read(request: inward.Request) -> inward.Imported:
    """Reads and places an M2-Encoder.

    Raises:
        UserError: the file does not fit the architecture, or the tokenizer cannot be read.
    """
    source = request.weights
    arch = m2_arch.read(request.arch)
    found = m2_layout.official(source.content, arch.model, str(source.file), request.allow_missing)
    dtype = request.dtype or inward.narrowest(found.tensors, str(source.file))
    cfg = dataclasses.replace(arch.model, param_dtype=dtype, dtype="float32")
    tokenizer = _tokenizer(request, cfg)
    model = params_lib.abstract(cfg)
    places = inward.layout(model, cfg.width, request.mesh)
    params = place.place(
        model,
        places,
        pieces(found.tensors, cfg),
        fresh=functools.partial(inward.fresh, cfg, places),
    )
    return inward.Imported(
        cfg,
        params,
        tokenizer,
        _preprocess(source.file.parent, cfg),
        _notes(found, arch, dtype, tokenizer),
        lambda: m2_check.run(found.tensors, cfg, params, tokenizer),
    )


def pieces(tensors: Mapping[str, np.ndarray], cfg: config_lib.Model) -> dict[str, place.Pieces]:
    """The official tensors by the parameter they are part of, in our layout; all of them views."""
    found: dict[str, dict[int | None, tuple[str, np.ndarray]]] = {}
    for name, slot in slots(cfg).items():
        if name in tensors:
            piece = (name, slot.inward(tensors[name]))
            found.setdefault(slot.name, {})[slot.layer] = piece
    return dict(found)


def _tokenizer(request: inward.Request, cfg: config_lib.Model) -> Tokenizer | None:
    """The tokenizer of the folder that was named, or of the weights' own if it has one."""
    directory = request.tokenizer or request.weights.file.parent
    own = directory / TOKENIZER
    if own.is_file():
        tokenizer = tokenizer_from_dict(json_files.read(own))
    elif request.tokenizer is None and not (directory / glm.FILE).is_file():
        return None
    else:
        own, tokenizer = directory / glm.FILE, glm.read(directory, cfg.max_text_len)
    if tokenizer.vocab_size > cfg.vocab_size:
        raise UserError(
            f"{own}: has {tokenizer.vocab_size:,} pieces but {cfg.name} embeds "
            f"{cfg.vocab_size:,}: name the tokenizer of this model with --tokenizer DIR"
        )
    return tokenizer


def _preprocess(directory: Path, cfg: config_lib.Model) -> Preprocess:
    """The release's, or what our export wrote beside the weights."""
    saved = json_files.read(directory / PREPROCESS)
    if "m2jax" not in saved:
        return Preprocess(cfg.image_size)
    return Preprocess.from_dict(saved["m2jax"], cfg.image_size)


def _notes(
    found: m2_layout.Official, arch: m2_arch.Architecture, dtype: str, tokenizer: Tokenizer | None
) -> tuple[str, ...]:
    """What the user should know."""
    notes = [f"layout {found.layout}, parameters {dtype}, {len(found.tensors)} tensors"]
    if arch.without_effect:
        notes.append(f"keys without effect on the features: {', '.join(arch.without_effect)}")
    if found.dropped:
        notes.append(f"left out {len(found.dropped)}: {m2_layout.listed(found.dropped)}")
    if found.missing:
        notes.append(f"initial values for {len(found.missing)}: {m2_layout.listed(found.missing)}")
    if tokenizer is None:
        notes.append("no tokenizer: texts must come as ids; --tokenizer DIR adds one")
    return tuple(notes)
