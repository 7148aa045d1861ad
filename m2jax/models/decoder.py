# SPDX-License-Identifier: Apache-2.0
"""A decoder: layers of self-attention, cross-attention to a memory, and a feed-forward, pre-norm.

Causal it writes text about an image (IC); not causal it paints masked patches from a text (TG-MIM).
``models.stepwise`` runs it one token at a time on cached keys and values, to the same numbers.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from m2jax import config as config_lib
from m2jax.dist.sharding import constrain
from m2jax.models import layers

Bias = Float[Array, "#batch 1 #queries keys"]


class Block(nnx.Module):
    """The weights of a whole stack of layers; the methods run one of them."""

    def __init__(self, rngs: nnx.Rngs, cfg: config_lib.Model, depth: int):
        d, f, dtype, stack = cfg.width, 4 * cfg.width, jnp.dtype(cfg.param_dtype), (depth,)
        self.head_dim = cfg.width // cfg.heads

        linear = functools.partial(layers.Linear.scaled, rngs, stack=stack, dtype=dtype)

        def norm() -> layers.LayerNorm:
            return layers.LayerNorm(rngs, d, stack=stack, dtype=dtype)

        into, back = ("embed", "heads"), ("heads", "embed")
        residual_gain = (3 * depth) ** -0.5  # keeps the residual stream's variance near 1
        self.attn_norm, self.cross_norm, self.ffn_norm = norm(), norm(), norm()
        self.q, self.k, self.v = (linear((d, d), into, 1.0) for _ in range(3))
        self.out = linear((d, d), back, residual_gain)
        self.cross_q, self.cross_k, self.cross_v = (linear((d, d), into, 1.0) for _ in range(3))
        self.cross_out = linear((d, d), back, residual_gain)
        self.fc1 = linear((d, f), ("embed", "mlp"), 1.0)
        self.fc2 = linear((f, d), ("mlp", "embed"), residual_gain)

    def project(self, x: Float[Array, "b l d"]) -> list[Float[Array, "b l h k"]]:
        """Queries, keys and values of the tokens."""
        projected = layers.normed(self.attn_norm, self.q, self.k, self.v)(x)
        return [self._heads(checkpoint_name(y, "qkv")) for y in projected]

    def remember(self, memory: Float[Array, "b m d"]) -> list[Float[Array, "b m h k"]]:
        """Keys and values of the memory."""
        return [self._heads(linear(memory)) for linear in (self.cross_k, self.cross_v)]

    def mix(
        self,
        x: Float[Array, "b l d"],
        attended: Float[Array, "b l h k"],
        memory: list[Float[Array, "b m h k"]],
        memory_bias: Bias | None,
    ) -> Float[Array, "b l d"]:
        """The rest of a layer, from what its self-attention found."""
        x, queries = self.ask(x, attended)
        return self.answer(x, layers.attention(queries, *memory, bias=memory_bias))

    def ask(
        self, x: Float[Array, "b l d"], attended: Float[Array, "b l h k"]
    ) -> tuple[Float[Array, "b l d"], Float[Array, "b l h k"]]:
        """The tokens with what their self-attention found, and what they ask the memory."""
        x = x + checkpoint_name(self.out(_merged(attended)), "attention_out")
        return x, self._heads(layers.normed(self.cross_norm, self.cross_q)(x)[0])

    def answer(
        self, x: Float[Array, "b l d"], found: Float[Array, "b l h k"]
    ) -> Float[Array, "b l d"]:
        """The rest of a layer, from what the memory answered."""
        x = x + self.cross_out(_merged(found))
        hidden = checkpoint_name(layers.normed(self.ffn_norm, self.fc1)(x)[0], "ffn_in")
        return x + self.fc2(layers.gelu(hidden))

    def _heads(self, x: Float[Array, "b l d"]) -> Float[Array, "b l h k"]:
        return x.reshape(*x.shape[:2], -1, self.head_dim)


class Decoder(nnx.Module):
    """A stack of decoder layers and its last norm.

    Args:
        rngs: source of the initial values.
        cfg: width, heads, precision, recomputation and unrolling, as the encoder has them.
        depth: number of layers.
        causal: a token sees itself and those before it.
    """

    def __init__(self, rngs: nnx.Rngs, cfg: config_lib.Model, depth: int, *, causal: bool):
        self.cfg, self.depth, self.causal = cfg, depth, causal
        self.blocks = Block(rngs, cfg, depth)
        self.norm = layers.LayerNorm(rngs, cfg.width, dtype=jnp.dtype(cfg.param_dtype))

    def __call__(
        self,
        tokens: Float[Array, "batch length width"],
        memory: Float[Array, "batch memory width"],
        *,
        memory_mask: Bool[Array, "batch memory"] | None = None,
    ) -> Float[Array, "batch length width"]:
        """Runs every layer on all tokens at once.

        Args:
            tokens: embedded, positions added.
            memory: what the layers attend to besides the tokens.
            memory_mask: false where the memory is padding.
        """
        graph, state = nnx.split(self.blocks)
        bias, memory_bias = self._causal_bias(tokens.shape[1]), hidden(memory_mask)

        def layer(x: jax.Array, weights: nnx.State) -> jax.Array:
            block = nnx.merge(graph, weights)
            queries, keys, values = block.project(x)
            attended = layers.attention(queries, keys, values, bias=bias)
            return block.mix(x, attended, block.remember(memory), memory_bias)

        layer = layers.rematerialise(layer, self.cfg.remat)

        def body(x: jax.Array, weights: nnx.State) -> tuple[jax.Array, None]:
            return constrain(layer(x, weights), ("batch", None, None)), None

        unroll = min(self.cfg.unroll, self.depth)
        return self.norm(jax.lax.scan(body, tokens, state, unroll=unroll)[0])

    def _causal_bias(self, length: int) -> Bias | None:
        if not self.causal:
            return None
        order = jnp.arange(length)
        return jnp.where(order[:, None] >= order[None, :], 0.0, -jnp.inf)[None, None]


def hidden(mask: Bool[Array, "batch keys"] | None) -> Bias | None:
    """What is added to scores so that no query sees a key whose mask is false."""
    return None if mask is None else jnp.where(mask, 0.0, -jnp.inf)[:, None, None, :]


def _merged(heads: Float[Array, "b l h k"]) -> Float[Array, "b l d"]:
    return heads.reshape(*heads.shape[:2], -1)
