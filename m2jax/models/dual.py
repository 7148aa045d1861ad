# SPDX-License-Identifier: Apache-2.0
"""Dual encoders of the CLIP family: CLIP, SigLIP (1 and 2), Chinese-CLIP, by one config.

Sources: Radford et al. 2021 (CLIP), Zhai et al. 2023 (SigLIP), Yang et al. 2022 (Chinese-CLIP).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from m2jax.config import UserError
from m2jax.config_dual import Dual, Tower
from m2jax.dist.sharding import constrain
from m2jax.models import layers
from m2jax.models.m2 import padded_vocab, unit
from m2jax.models.stack import ACTIVATIONS, Stack


class DualFeatures(NamedTuple):
    """One modality, encoded."""

    features: Float[Array, "batch out"]  # unit rows
    tokens: Float[Array, "batch length width"]  # after the last layer, before the last norm


class AttentionPool(nnx.Module):
    """SigLIP's pooling: one learned query attends to all patches, then a residual MLP."""

    def __init__(self, rngs: nnx.Rngs, cfg: Dual):
        d, f, dtype = cfg.vision.width, cfg.vision.mlp_width, jnp.dtype(cfg.param_dtype)
        self.heads, self.activation = cfg.vision.heads, cfg.vision.activation

        def linear(shape: tuple[int, int], axes: tuple[str, str]) -> layers.Linear:
            std, zero = layers.normal(shape[0] ** -0.5), layers.constant(0.0)
            return layers.Linear(rngs, shape, axes, init=std, bias_init=zero, dtype=dtype)

        self.probe = layers.param(rngs, layers.normal(d**-0.5), (d,), ("embed",), dtype)
        self.q = linear((d, d), ("embed", "heads"))
        self.k = linear((d, d), ("embed", "heads"))
        self.v = linear((d, d), ("embed", "heads"))
        self.out = linear((d, d), ("heads", "embed"))
        self.norm = layers.LayerNorm(rngs, d, eps=cfg.vision.eps, dtype=dtype)
        self.fc1 = linear((d, f), ("embed", "mlp"))
        self.fc2 = linear((f, d), ("mlp", "embed"))

    def __call__(self, tokens: Float[Array, "batch length width"]) -> Float[Array, "batch width"]:
        """The pooled vector, out + fc2(act(fc1(norm(out))))."""
        batch, _, width = tokens.shape
        query = self.q(self.probe[...].astype(tokens.dtype)).reshape(1, 1, self.heads, -1)
        query = jnp.broadcast_to(query, (batch, *query.shape[1:]))
        k, v = (y(tokens).reshape(batch, -1, self.heads, query.shape[-1]) for y in (self.k, self.v))
        x = self.out(layers.attention(query, k, v).reshape(batch, width))
        return x + self.fc2(ACTIVATIONS[self.activation](self.fc1(self.norm(x))))


class VisionTower(nnx.Module):
    """Pixels to one vector."""

    def __init__(self, rngs: nnx.Rngs, cfg: Dual):
        vision, dtype = cfg.vision, jnp.dtype(cfg.param_dtype)
        d, p, tokens = vision.width, vision.patch_size, vision.pooling == "cls"
        grid = vision.image_size // p
        self.cfg, self.grid = vision, grid

        def table(*shape: int, std: float = d**-0.5) -> nnx.Param:
            axes = (*(None,) * (len(shape) - 1), "embed")
            return layers.param(rngs, layers.normal(std), shape, axes, dtype)

        def norm() -> layers.LayerNorm:
            return layers.LayerNorm(rngs, d, eps=vision.eps, dtype=dtype)

        self.kernel = table(p, p, 3, d, std=(3 * p * p) ** -0.5)
        self.bias = table(d, std=0.0) if vision.patch_bias else None
        self.cls_token = table(d) if tokens else None
        self.positions = table(grid * grid + tokens, d)
        self.pre_norm = norm() if vision.pre_norm else None
        self.stack = _stack(rngs, cfg, vision, post_norm=False)
        self.norm = norm()
        self.pool = None if tokens else AttentionPool(rngs, cfg)
        self.head = _head(rngs, cfg, d, bias=False) if vision.projection else None

    def embed(self, pixels: Float[Array, "b h w 3"]) -> Float[Array, "b tokens width"]:
        """Normalised pixels to patch tokens, the class token (if any) first."""
        b, p, grid = pixels.shape[0], self.cfg.patch_size, self.grid
        x = pixels[:, : grid * p, : grid * p].reshape(b, grid, p, grid, p, 3).swapaxes(2, 3)
        kernel = self.kernel[...].astype(x.dtype).reshape(p * p * 3, -1)
        x = x.reshape(b, grid * grid, p * p * 3) @ kernel
        if self.bias is not None:
            x = x + self.bias[...].astype(x.dtype)
        if self.cls_token is not None:
            first = jnp.broadcast_to(self.cls_token[...].astype(x.dtype), (b, 1, x.shape[-1]))
            x = jnp.concatenate([first, x], axis=1)
        x = x + self.positions[...].astype(x.dtype)
        return x if self.pre_norm is None else self.pre_norm(x)

    def __call__(self, pixels: Float[Array, "b h w 3"]) -> DualFeatures:
        """Encodes pixels already normalised by mean and standard deviation."""
        tokens = self.stack(constrain(self.embed(pixels), ("batch", None, None)))
        pooled = self.norm(tokens[:, 0]) if self.pool is None else self.pool(self.norm(tokens))
        return DualFeatures(unit(pooled if self.head is None else self.head(pooled)), tokens)


class TextTower(nnx.Module):
    """Token ids to one vector."""

    def __init__(self, rngs: nnx.Rngs, cfg: Dual):
        text, dtype = cfg.text, jnp.dtype(cfg.param_dtype)
        d, self.cfg = text.width, text

        def table(rows: int, axis: str | None, std: float) -> nnx.Param:
            return layers.param(rngs, layers.normal(std), (rows, d), (axis, "embed"), dtype)

        self.embed = table(padded_vocab(text.vocab_size), "vocab", 0.02)
        self.positions = table(text.positions, None, 0.01)
        self.types = table(text.token_types, None, 0.02) if text.token_types else None
        self.norm = layers.LayerNorm(rngs, d, eps=text.eps, dtype=dtype)
        self.stack = _stack(rngs, cfg, text, post_norm=text.post_norm)
        self.head = _head(rngs, cfg, d, bias=text.head_bias)

    def __call__(
        self, ids: Int[Array, "b l"], mask: Bool[Array, "b l"], dtype: jnp.dtype
    ) -> DualFeatures:
        """Encodes ids; ``mask`` is 1 for tokens, 0 for padding."""
        x = layers.lookup(self.embed[...], ids, dtype)
        x = x + self.positions[...][: ids.shape[1]].astype(dtype)
        if self.types is not None:
            x = x + self.types[...][0].astype(dtype)
        if self.cfg.post_norm:
            x = self.norm(x)
        x = constrain(x, ("batch", None, None))
        tokens = self.stack(x, bias=self._bias(mask))
        pooled = jnp.take_along_axis(tokens, self._place(ids)[:, None, None], axis=1)[:, 0]
        return DualFeatures(
            unit(self.head(pooled if self.cfg.post_norm else self.norm(pooled))), tokens
        )

    def _bias(self, mask: jax.Array) -> jax.Array | None:
        """Added to the scores: the lowest finite number where a query must not see a key.

        Finite, so that a row without any token gives numbers, as the releases do.
        """
        low = jnp.finfo(jnp.float32).min
        bias = None
        if self.cfg.masked:
            bias = jnp.where(mask != 0, 0.0, low)[:, None, None, :]
        if self.cfg.causal:
            seen = jnp.tril(jnp.ones((mask.shape[1], mask.shape[1]), bool))
            causal = jnp.where(seen, 0.0, low)[None, None]
            bias = causal if bias is None else jnp.minimum(bias, causal)
        return bias

    def _place(self, ids: jax.Array) -> jax.Array:
        """Index of the token that stands for the text, one per row."""
        if self.cfg.pooling == "argmax":
            return ids.argmax(-1)
        if self.cfg.pooling == "eos":
            return (ids == self.cfg.eos_id).argmax(-1)
        place = ids.shape[1] - 1 if self.cfg.pooling == "last" else 0
        return jnp.full(ids.shape[:1], place)


class DualEncoder(nnx.Module):
    """A CLIP-like model.

    Args:
        cfg: a checked ``config_dual.Dual``.
        rngs: source of the initial values.
    """

    def __init__(self, cfg: Dual, rngs: nnx.Rngs):
        self.cfg = cfg
        self.dtype = jnp.dtype(cfg.dtype)
        self.vision = VisionTower(rngs, cfg)
        self.text = TextTower(rngs, cfg)
        scale = math.log(10.0) if cfg.logit_bias else math.log(1 / 0.07)
        param_dtype = jnp.dtype(cfg.param_dtype)
        self.logit_scale = layers.param(rngs, layers.constant(scale), (), (), param_dtype)
        self.logit_bias = (
            layers.param(rngs, layers.constant(-10.0), (), (), param_dtype)
            if cfg.logit_bias
            else None
        )

    def encode_image(self, pixels: Float[Array, "batch height width 3"]) -> DualFeatures:
        """Encodes RGB images in [0, 1] of exactly the model's size.

        Raises:
            UserError: images of another size; the position table is not interpolated.
        """
        size = self.cfg.vision.image_size
        if pixels.shape[1:] != (size, size, 3):
            raise UserError(
                f"pixels {tuple(pixels.shape)}: this model takes [batch, {size}, {size}, 3]: "
                "use its preprocessing"
            )
        mean, std = jnp.array(self.cfg.vision.mean), jnp.array(self.cfg.vision.std)
        return self.vision(((pixels - mean) / std).astype(self.dtype))

    def encode_text(
        self,
        ids: Int[Array, "batch length"],
        mask: Int[Array, "batch length"] | Bool[Array, "batch length"],
    ) -> DualFeatures:
        """Encodes token ids; ``mask`` is 1 for tokens and 0 for padding.

        Models whose config says ``masked=False`` were trained without a mask and ignore it.

        Raises:
            UserError: texts longer than the position table.
        """
        if ids.shape[1] > self.cfg.text.positions:
            raise UserError(
                f"ids {tuple(ids.shape)}: this model takes at most {self.cfg.text.positions} "
                "tokens: cut the texts"
            )
        return self.text(ids, mask, self.dtype)


def _stack(rngs: nnx.Rngs, cfg: Dual, tower: Tower, *, post_norm: bool) -> Stack:
    return Stack(
        rngs,
        tower,
        post_norm=post_norm,
        attention=cfg.attention,
        dtype=jnp.dtype(cfg.param_dtype),
        remat=cfg.remat,
        unroll=cfg.unroll,
    )


def _head(rngs: nnx.Rngs, cfg: Dual, width: int, *, bias: bool) -> layers.Linear:
    """The map to the features."""
    return layers.Linear(
        rngs,
        (width, cfg.out_dim),
        ("embed", "features"),
        init=layers.normal(width**-0.5),
        bias_init=layers.constant(0.0) if bias else None,
        dtype=jnp.dtype(cfg.param_dtype),
    )
