# SPDX-License-Identifier: Apache-2.0
"""An M2-Encoder under the official names, for PyTorch users: safetensors, config, model card."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from m2jax import config as config_lib
from m2jax.checkpoint.convert import (
    json_files,
    m2_arch,
    m2_inward,
    m2_layout,
    outward,
    safetensors_file,
)
from m2jax.checkpoint.convert.m2_names import slots
from m2jax.config import UserError
from m2jax.data import glm
from m2jax.models import params as params_lib
from m2jax.models.params import Params

WEIGHTS = "model.safetensors"
POSITIONS = 1024  # rows of the release's text position table, whatever the text length

_CARD = """---
library_name: m2jax
tags: [image-text, chinese, english]
---
# {name}

A bilingual (Chinese-English) image-text encoder with the architecture of M2-Encoder
(arXiv 2401.15896), exported by m2jax: {parameters:,} parameters, {dtype}.

| file | holds |
|---|---|
| `{weights}` | every tensor under its official name, in torch layout |
| `config.json` | the sizes, as the official code's config keys |
| `{preprocess}` | what images go through |
| {tokenizer} |

Features are compared by their cosine; the demo's logits are exp(logit_scale) times it. Images:
{image_size} x {image_size}, straight bicubic resize, RGB in [0, 1]; (x - 0.5) / 0.5 happens inside
the model. Texts: at most {max_text_len} tokens.

In JAX: `m2jax.load("THIS FOLDER")`. In PyTorch: build the official `VLMo` from `config.json` and
`load_state_dict(safetensors.torch.load_file("{weights}"))`.
"""


def write(directory: Path, model: outward.Model) -> None:
    """Fills an empty folder.

    Raises:
        UserError: the official code could not hold this model.
    """
    cfg = model.config
    if not isinstance(cfg, config_lib.Model):
        raise UserError("--format m2-torch: holds M2-Encoders alone: use another format")
    if cfg.text_positions != POSITIONS:
        raise UserError(
            f"model.text_positions={cfg.text_positions}: the official code builds {POSITIONS}: "
            "a model to export must be trained with that"
        )
    shapes = m2_layout.shapes(cfg)
    tensors = OfficialTensors(cfg, model.params)
    dtype = np.dtype(cfg.param_dtype)
    with (directory / WEIGHTS).open("wb") as handle:
        safetensors_file.write(handle, shapes, dtype, tensors.__getitem__)
    json_files.write(directory / "config.json", m2_arch.to_official(cfg))
    size = {"height": cfg.image_size, "width": cfg.image_size}
    saved = model.preprocessing.to_dict()
    steps = {"do_resize": True, "size": size, "resample": 3, "do_rescale": True, "m2jax": saved}
    json_files.write(directory / m2_inward.PREPROCESS, steps)
    card = _CARD.format(
        name=cfg.name,
        parameters=sum(int(np.prod(shape)) for shape in shapes.values()),
        dtype=dtype.name,
        weights=WEIGHTS,
        preprocess=m2_inward.PREPROCESS,
        tokenizer=_tokenizer(directory, model),
        image_size=cfg.image_size,
        max_text_len=cfg.max_text_len,
    )
    (directory / "README.md").write_text(card, encoding="utf-8")


class OfficialTensors:
    """The tensors of a model by official name, each made when it is asked for."""

    def __init__(self, cfg: config_lib.Model, params: Params) -> None:
        self._slots, self._params = slots(cfg), params_lib.flatten(params)

    def __getitem__(self, name: str) -> np.ndarray:
        """One tensor, in torch layout, the padding of the token table left off."""
        slot = self._slots[name]
        array = self._params[slot.name]
        array = array if slot.layer is None else array[slot.layer]
        return slot.outward(np.asarray(array)[: slot.rows] if slot.rows else np.asarray(array))


def _tokenizer(directory: Path, model: outward.Model) -> str:
    """Writes the tokenizer's file; returns its line of the model card."""
    if model.tokenizer is None:
        return "(none) | no tokenizer came with the model"
    if isinstance(model.tokenizer, glm.GLMTokenizer):
        (directory / glm.FILE).write_bytes(model.tokenizer.model)
        return f"`{glm.FILE}` | the pieces of the GLM-10B-Chinese tokenizer (THUDM/glm-10b-chinese)"
    json_files.write(directory / m2_inward.TOKENIZER, model.tokenizer.to_dict())
    return f"`{m2_inward.TOKENIZER}` | the tokenizer, as m2jax saves it"
