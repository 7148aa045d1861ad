# SPDX-License-Identifier: Apache-2.0
"""Where each tensor of the official M2-Encoder release lives here (spec section 14).

The release names one tensor per layer in torch layout; here the layers of a stack share one array
and matrices are [in, out]. A ``Slot`` says which array, which layer of it, and how the axes turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Shaped

from m2jax import config as config_lib


class Slot(NamedTuple):
    """The place of one official tensor."""

    name: str  # dotted parameter name
    layer: int | None  # index on the stacked axis
    turn: str  # "" as it is | "T" transpose | "conv" | "flat" (leading 1s dropped)
    rows: int | None = None  # rows that count, where the table here is padded

    def inward(self, tensor: Shaped[np.ndarray, ...]) -> Shaped[np.ndarray, ...]:
        """Torch layout to ours."""
        if self.turn == "T":
            return tensor.T
        if self.turn == "conv":  # [out, in, kh, kw] -> [kh, kw, in, out]
            return tensor.transpose(2, 3, 1, 0)
        return tensor.reshape(-1) if self.turn == "flat" else tensor

    def outward(self, array: Shaped[np.ndarray, ...]) -> Shaped[np.ndarray, ...]:
        """Ours to torch layout."""
        if self.turn == "T":
            return array.T
        if self.turn == "conv":
            return array.transpose(3, 2, 0, 1)
        return array.reshape(1, 1, -1) if self.turn == "flat" else array


_LINEAR = {"weight": ("kernel", "T"), "bias": ("bias", "")}
_NORM = {"weight": ("scale", ""), "bias": ("bias", "")}
_BLOCK = {
    "self_attn.q_proj.{w}": ("q", _LINEAR),
    "self_attn.k_proj.{w}": ("k", _LINEAR),
    "self_attn.v_proj.{w}": ("v", _LINEAR),
    "self_attn.out_proj.{w}": ("out", _LINEAR),
    "self_attn.inner_attn_ln.{w}": ("inner_norm", _NORM),
    "self_attn_layer_norm.{w}": ("attn_norm", _NORM),
    "ffn.{w}.fc1": ("fc1", _LINEAR),
    "ffn.{w}.fc2": ("fc2", _LINEAR),
    "ffn.{w}.ffn_layernorm": ("mlp_norm", _NORM),
    "final_layer_norm.{w}": ("ffn_norm", _NORM),
}
_HEADS = {
    "itc_text_proj": "text_head",
    "itc_image_proj": "image_head",
    "itc_vl_text_proj": "text_vl_head",
    "itc_vl_image_proj": "image_vl_head",
}


def slots(cfg: config_lib.Model) -> Mapping[str, Slot]:
    """Every official name of a model of these sizes, with its place."""
    found = {
        "logit_scale": Slot("logit_scale", None, ""),
        "logit_vl_scale": Slot("logit_vl_scale", None, ""),
        "backbone.text_embed.weight": Slot("text_embed", None, "", cfg.vocab_size),
        "backbone.vision_embed.mask_token": Slot("vision_embed.mask_token", None, "flat"),
        "backbone.vision_embed.cls_token": Slot("vision_embed.cls_token", None, "flat"),
        "backbone.vision_embed.proj.weight": Slot("vision_embed.kernel", None, "conv"),
        "backbone.vision_embed.proj.bias": Slot("vision_embed.bias", None, ""),
        "backbone.encoder.embed_positions.A.weight": Slot("image_positions", None, ""),
        "backbone.encoder.embed_positions.B.weight": Slot("text_positions", None, ""),
        "norm.weight": Slot("norm.scale", None, ""),
        "norm.bias": Slot("norm.bias", None, ""),
        "pooler.dense.weight": Slot("pooler.kernel", None, "T"),
        "pooler.dense.bias": Slot("pooler.bias", None, ""),
    }
    found |= {f"{o}.fc.weight": Slot(f"{ours}.kernel", None, "T") for o, ours in _HEADS.items()}
    found |= _encoder("backbone.encoder", "backbone", cfg.backbone_layers)
    found |= _encoder("backbone_vl", "vl", cfg.vl_layers)
    return found


def _encoder(official: str, ours: str, depth: int) -> dict[str, Slot]:
    """The slots of one encoder: its layers, A and B, and its last norm."""
    found = {}
    for way in "AB":
        for suffix, (leaf, _) in _NORM.items():
            found[f"{official}.layer_norm.{way}.{suffix}"] = Slot(
                f"{ours}.norms.{way}.{leaf}", None, ""
            )
        for layer in range(depth):
            for part, (module, leaves) in _BLOCK.items():
                prefix = f"{official}.layers.{layer}.{part.format(w=way)}"
                for suffix, (leaf, turn) in leaves.items():
                    name = f"{ours}.blocks.{way}.{module}.{leaf}"
                    found[f"{prefix}.{suffix}"] = Slot(name, layer, turn)
    return found
