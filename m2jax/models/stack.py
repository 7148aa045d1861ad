# SPDX-License-Identifier: Apache-2.0
"""A plain transformer encoder, pre-norm (CLIP, SigLIP) or post-norm (BERT), run by one scan."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from m2jax.config_dual import Tower
from m2jax.dist.sharding import constrain
from m2jax.models import layers

ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": layers.gelu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


class Block(nnx.Module):
    """The weights of a whole stack of layers; ``__call__`` runs one of them."""

    def __init__(
        self, rngs: nnx.Rngs, cfg: Tower, *, post_norm: bool, attention: str, dtype: jnp.dtype
    ):
        d, f, stack = cfg.width, cfg.mlp_width, (cfg.layers,)
        self.heads, self.post_norm, self.activation = cfg.heads, post_norm, cfg.activation
        self.attention = attention

        linear = functools.partial(layers.Linear.scaled, rngs, stack=stack, dtype=dtype)

        def norm() -> layers.LayerNorm:
            return layers.LayerNorm(rngs, d, eps=cfg.eps, stack=stack, dtype=dtype)

        residual_gain = (2 * cfg.layers) ** -0.5  # keeps the residual stream's variance near 1
        self.attn_norm = norm()
        self.q = linear((d, d), ("embed", "heads"), 1.0)
        self.k = linear((d, d), ("embed", "heads"), 1.0)
        self.v = linear((d, d), ("embed", "heads"), 1.0)
        self.out = linear((d, d), ("heads", "embed"), residual_gain)
        self.ffn_norm = norm()
        self.fc1 = linear((d, f), ("embed", "mlp"), 1.0)
        self.fc2 = linear((f, d), ("mlp", "embed"), residual_gain)

    def __call__(
        self, x: Float[Array, "batch length width"], bias: Float[Array, "#batch 1 #l l"] | None
    ) -> Float[Array, "batch length width"]:
        """One layer: attention and feed-forward, each with its residual and norm."""
        if self.post_norm:
            x = self.attn_norm(x + self._attend([y(x) for y in (self.q, self.k, self.v)], bias))
            return self.ffn_norm(x + self._feed(self.fc1(x)))
        x = x + self._attend(layers.normed(self.attn_norm, self.q, self.k, self.v)(x), bias)
        return x + self._feed(layers.normed(self.ffn_norm, self.fc1)(x)[0])

    @jax.named_scope("attend")
    def _attend(self, projected: list[jax.Array], bias: jax.Array | None) -> jax.Array:
        q, k, v = (y.reshape(*y.shape[:2], self.heads, -1) for y in projected)
        heads = layers.ATTENTION[self.attention](q, k, v, bias=bias)
        return self.out(heads.reshape(*heads.shape[:2], -1))

    @jax.named_scope("ffn")
    def _feed(self, hidden: jax.Array) -> jax.Array:
        return self.fc2(ACTIVATIONS[self.activation](hidden))


class Stack(nnx.Module):
    """A stack of layers. What precedes and follows it (embedding, last norm) is the tower's.

    Args:
        rngs: source of the initial values.
        cfg: sizes.
        post_norm: norms after the residual sums, as BERT has them, instead of before the branches.
        attention: a key of ``layers.ATTENTION``.
        dtype: of the parameters.
        remat: what the backward pass recomputes.
        unroll: layers per iteration of the scan.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        cfg: Tower,
        *,
        post_norm: bool,
        attention: str,
        dtype: jnp.dtype,
        remat: str,
        unroll: int,
    ):
        self.blocks = Block(rngs, cfg, post_norm=post_norm, attention=attention, dtype=dtype)
        self.remat, self.unroll = remat, min(unroll, cfg.layers)

    def __call__(
        self,
        tokens: Float[Array, "batch length width"],
        *,
        bias: Float[Array, "#batch 1 #l l"] | None = None,
    ) -> Float[Array, "batch length width"]:
        """Runs every layer; ``bias`` is added to the attention scores."""
        graph, state = nnx.split(self.blocks)
        layer = layers.rematerialise(
            lambda x, weights: nnx.merge(graph, weights)(x, bias), self.remat
        )

        def body(x, weights):
            return constrain(layer(x, weights), ("batch", None, None)), None

        return jax.lax.scan(body, tokens, state, unroll=self.unroll)[0]
