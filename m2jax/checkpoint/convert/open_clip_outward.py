# SPDX-License-Identifier: Apache-2.0
"""A model of the CLIP family as a folder that open_clip loads; Chinese-CLIP in cn_clip's names."""

from __future__ import annotations

from pathlib import Path

from m2jax.checkpoint.convert import (
    cn_clip,
    dual_files,
    dual_tensors,
    json_files,
    open_clip_config,
    outward,
)
from m2jax.checkpoint.convert.keys import same_function
from m2jax.config import UserError
from m2jax.config_dual import Dual

WEIGHTS = "open_clip_model.safetensors"

_CARD = """---
library_name: open_clip
tags: [image-text]
---
# {family}

Exported by m2jax, {dtype}. {load}.
"""
_LOAD = {
    "open_clip": 'In PyTorch: `open_clip.create_model_from_pretrained("local-dir:THIS FOLDER")`; '
    'in JAX: `m2jax.load("THIS FOLDER")`',
    "cn_clip": f'In PyTorch: `model.load_state_dict(safetensors.torch.load_file("{WEIGHTS}"))` on '
    "a `cn_clip.clip.model.CLIP` of these sizes; in JAX: `m2jax convert import THIS_FOLDER DST "
    "--arch chinese-clip`",
}


def write(directory: Path, model: outward.Model) -> None:
    """Fills an empty folder.

    Raises:
        UserError: open_clip, or cn_clip, cannot hold this model.
    """
    cfg = model.config
    if not isinstance(cfg, Dual):
        raise UserError("--format open-clip: holds the CLIP family alone: use m2-torch")
    library = "cn_clip" if cfg.family == "chinese-clip" else "open_clip"
    if library == "cn_clip":
        _check_cn_clip(cfg)
    else:
        steps = dual_files.open_clip_preprocess_config(model.preprocessing)
        config = open_clip_config.write(cfg, steps)
        if model.tokenizer is not None:  # any name: open_clip then reads the folder's own files
            config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "local"
        json_files.write(directory / "open_clip_config.json", config)
    dual_tensors.write(directory / WEIGHTS, model.params, cfg, "open-clip")
    dual_files.write_tokenizer(directory, model.tokenizer)
    card = _CARD.format(family=cfg.family, dtype=cfg.param_dtype, load=_LOAD[library])
    (directory / "README.md").write_text(card, encoding="utf-8")


def _check_cn_clip(cfg: Dual) -> None:
    """Refuses what cn_clip's own code would read as another function."""
    try:
        same = same_function(cn_clip.infer(dual_tensors.shapes(cfg, "open-clip"), "export"), cfg)
    except UserError:
        same = False
    if not same:
        raise UserError(
            "export open-clip: cn_clip cannot hold this Chinese-CLIP (its heads are 64 wide, its "
            "activations and means fixed): use --format hf"
        )
