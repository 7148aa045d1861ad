# SPDX-License-Identifier: Apache-2.0
"""How deep each parameter lies, for learning rates that shrink towards the input.

Layer-wise decay as BEiT's fine-tuning has it (Bao et al. 2022, appendix): embeddings are layer 0,
blocks follow, and what stands on top (last norms, heads, scales) learns at the full rate.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from m2jax.config_dual import Architecture, Dual
from m2jax.models.params import Abstract, flatten

_M2_EMBEDDINGS = ("vision_embed.", "text_embed", "image_positions", "text_positions")
_DUAL_EMBEDDINGS = {
    "vision": ("kernel", "bias", "cls_token", "positions", "pre_norm"),
    "text": ("embed", "positions", "types"),
}


def layer_scales(cfg: Architecture, model: Abstract, decay: float) -> Mapping[str, np.ndarray]:
    """``decay ** (layers above)`` for every parameter, by dotted name.

    Args:
        cfg: of the model.
        model: its parameters.
        decay: rate of a layer / rate of the layer above it.

    Returns:
        Arrays that broadcast against their parameters: one factor, or one per layer of a stack.
    """
    found = {}
    for name, leaf in flatten(model.params).items():
        above = _dual_height(cfg, name) if isinstance(cfg, Dual) else _m2_height(cfg, name)
        above = np.asarray(above)
        found[name] = (decay**above).reshape(above.shape + (1,) * (len(leaf.shape) - above.ndim))
    return found


def _m2_height(cfg, name: str) -> int | np.ndarray:
    """Layers above a parameter of an M2-Encoder, one number per layer for those of a stack."""
    below, total = cfg.backbone_layers, cfg.backbone_layers + cfg.vl_layers
    if name.startswith(_M2_EMBEDDINGS):
        return total + 1
    if name.startswith("backbone.blocks."):
        return total - np.arange(below)
    if name.startswith("backbone.norms."):  # as its last layer
        return cfg.vl_layers + 1
    if name.startswith("vl.blocks."):
        return cfg.vl_layers - np.arange(cfg.vl_layers)
    return 0


def _dual_height(cfg: Dual, name: str) -> int | np.ndarray:
    """Layers above a parameter of a dual encoder, counted in its own tower."""
    tower, _, rest = name.partition(".")
    if tower not in _DUAL_EMBEDDINGS:
        return 0
    layers = cfg.vision.layers if tower == "vision" else cfg.text.layers
    if rest.startswith("stack."):
        return layers - np.arange(layers)
    first = rest.split(".")[0]
    embedding_norm = tower == "text" and cfg.text.post_norm and first == "norm"
    return layers + 1 if first in _DUAL_EMBEDDINGS[tower] or embedding_norm else 0
