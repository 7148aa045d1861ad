# SPDX-License-Identifier: Apache-2.0
"""The M2-Encoder's forward in NumPy, over the official tensors, written from spec sections 3 to 7.

It shares no code with ``m2jax.models``: an import is checked against it. Float64 throughout, one
matrix in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import erf

Hidden = Float[np.ndarray, "batch tokens width"]


class Sizes(NamedTuple):
    """What the tensors' shapes do not tell."""

    heads: int
    backbone_layers: int
    vl_layers: int
    patch_size: int


class Reference:
    """The model, reading one tensor at a time.

    Args:
        read: the float64 tensor of an official name; may raise ``KeyError``.
        sizes: of the model.
    """

    def __init__(self, read: Callable[[str], np.ndarray], sizes: Sizes) -> None:
        self._read, self._sizes = read, sizes

    def image_tokens(
        self,
        pixels: Float[np.ndarray, "batch height width 3"],
        masked: Bool[np.ndarray, "batch patches"] | None = None,
    ) -> Hidden:
        """[CLS] and patches with their positions; masked patches are the mask token."""
        b, h, w, _ = pixels.shape
        p = self._sizes.patch_size
        x = (pixels.astype(np.float64) - 0.5) / 0.5
        kernel = self._read("backbone.vision_embed.proj.weight")
        patches = np.empty((b, h // p, w // p, len(kernel)))
        for row in range(h // p):
            for column in range(w // p):
                window = x[:, row * p : (row + 1) * p, column * p : (column + 1) * p]
                patches[:, row, column] = np.einsum("bijc,ocij->bo", window, kernel, optimize=True)
        patches = patches.reshape(b, -1, len(kernel))
        patches += self._read("backbone.vision_embed.proj.bias")
        if masked is not None:
            patches[masked] = self._read("backbone.vision_embed.mask_token")[0, 0]
        cls = np.repeat(self._read("backbone.vision_embed.cls_token"), b, 0)
        tokens = np.concatenate([cls, patches], 1)
        table = self._read("backbone.encoder.embed_positions.A.weight")
        return tokens + table[2 : 2 + tokens.shape[1]]

    def text_tokens(
        self, embed: Callable[[Int[np.ndarray, ...]], np.ndarray], ids: Int[np.ndarray, "batch len"]
    ) -> Hidden:
        """Rows of the token table (``embed`` looks them up) with their positions."""
        table = self._read("backbone.encoder.embed_positions.B.weight")
        return embed(ids) + table[2 : 2 + ids.shape[1]]

    def backbone(self, x: Hidden, way: str, keep: np.ndarray | None = None) -> Hidden:
        """The backbone with the weights of one way, its last norm included."""
        return self._encoder("backbone.encoder", self._sizes.backbone_layers, way, x, keep)

    def vl(self, x: Hidden, way: str, keep: np.ndarray | None = None) -> Hidden:
        """The vl layers with the weights of one way, their last norm included."""
        return self._encoder("backbone_vl", self._sizes.vl_layers, way, x, keep)

    def head(self, name: str, x: Hidden) -> Float[np.ndarray, "batch out"]:
        """Unit features of the first token."""
        z = x[:, 0] @ self._read(f"{name}.fc.weight").T
        return z / np.sqrt((z * z).sum(-1, keepdims=True))

    def pooled(self, x: Hidden) -> Float[np.ndarray, "batch width"]:
        """The pooler over the last norm: weights that no public forward reads."""
        return np.tanh(self._linear("pooler.dense", self._norm("norm", x[:, :1], 1e-6)))[:, 0]

    def scale(self, name: str) -> np.ndarray:
        """``logit_scale`` or ``logit_vl_scale``."""
        return self._read(name)

    def _encoder(self, prefix, depth, way, x, keep):
        if keep is not None:
            x = x * keep[..., None]
        for index in range(depth):
            layer = f"{prefix}.layers.{index}"
            x = x + self._attention(
                f"{layer}.self_attn",
                way,
                self._norm(f"{layer}.self_attn_layer_norm.{way}", x),
                keep,
            )
            h = self._norm(f"{layer}.final_layer_norm.{way}", x)
            h = self._linear(f"{layer}.ffn.{way}.fc1", h)
            h = self._norm(f"{layer}.ffn.{way}.ffn_layernorm", h * (1 + erf(h / np.sqrt(2))) / 2)
            x = x + self._linear(f"{layer}.ffn.{way}.fc2", h)
        return self._norm(f"{prefix}.layer_norm.{way}", x)

    def _attention(self, prefix, way, x, keep):
        b, length, width = x.shape
        shape = (b, length, self._sizes.heads, width // self._sizes.heads)
        q, k, v = (self._linear(f"{prefix}.{part}_proj.{way}", x).reshape(shape) for part in "qkv")
        scores = np.einsum("bqhd,bkhd->bhqk", q, k, optimize=True) / np.sqrt(shape[-1])
        if keep is not None:
            scores = np.where(keep[:, None, None, :], scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        merged = np.einsum("bhqk,bkhd->bqhd", weights, v, optimize=True).reshape(x.shape)
        merged = self._norm(f"{prefix}.inner_attn_ln.{way}", merged)
        return self._linear(f"{prefix}.out_proj.{way}", merged)

    def _linear(self, name, x):
        return x @ self._read(f"{name}.weight").T + self._read(f"{name}.bias")

    def _norm(self, name, x, eps=1e-5):
        centred = x - x.mean(-1, keepdims=True)
        y = centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + eps)
        return y * self._read(f"{name}.weight") + self._read(f"{name}.bias")
