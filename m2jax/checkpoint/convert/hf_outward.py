# SPDX-License-Identifier: Apache-2.0
"""A model of the CLIP family as a folder that transformers loads."""

from __future__ import annotations

from pathlib import Path

from m2jax.checkpoint.convert import dual_files, dual_tensors, hf_config, json_files, outward
from m2jax.config import UserError
from m2jax.config_dual import Dual

WEIGHTS = "model.safetensors"

_CARD = """---
library_name: transformers
tags: [image-text]
---
# {family}

A {name} exported by m2jax, {dtype}. In PyTorch: `transformers.{name}.from_pretrained("THIS
FOLDER")`; in JAX: `m2jax.load("THIS FOLDER")`. Images are resized as `preprocessor_config.json`
says{tokenizer}.
"""


def write(directory: Path, model: outward.Model) -> None:
    """Fills an empty folder.

    Raises:
        UserError: transformers has no class for this model.
    """
    cfg = model.config
    if not isinstance(cfg, Dual):
        raise UserError("--format hf: holds CLIP, SigLIP and Chinese-CLIP alone: use m2-torch")
    json_files.write(directory / "config.json", hf_config.write(cfg))
    dual_tensors.write(directory / WEIGHTS, model.params, cfg, "hf")
    steps = dual_files.hf_preprocess_config(model.preprocessing, cfg)
    json_files.write(directory / "preprocessor_config.json", steps)
    dual_files.write_tokenizer(directory, model.tokenizer)
    card = _CARD.format(
        family=cfg.family,
        name=hf_config.CLASSES[cfg.family],
        dtype=cfg.param_dtype,
        tokenizer="" if model.tokenizer else "; the model came without a tokenizer",
    )
    (directory / "README.md").write_text(card, encoding="utf-8")
