# SPDX-License-Identifier: Apache-2.0
"""A decoder: layers of self-attention, cross-attention to a memory, and a feed-forward, pre-norm.

Causal it writes text about an image (IC); not causal it paints masked patches from a text (TG-MIM).
``begin`` and ``advance`` run it one token at a time on cached keys and values, to the same numbers.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from m2jax import config as config_lib
from m2jax.dist.sharding import constrain
from m2jax.models import layers

Bias = Float[Array, "#batch 1 #queries keys"]


class Cache(NamedTuple):
    """Keys and values of every layer: of the tokens so far, and of the memory.

    Heads come before places, as a product over places wants them: the other order is copied into
    this one again for every token.
    """

    keys: Float[Array, "layers batch heads length dim"]
    values: Float[Array, "layers batch heads length dim"]
    memory_keys: Float[Array, "layers batch heads memory dim"]
    memory_values: Float[Array, "layers batch heads memory dim"]


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
        x = x + checkpoint_name(self.out(_merged(attended)), "attention_out")
        queries = self._heads(layers.normed(self.cross_norm, self.cross_q)(x)[0])
        found = layers.attention(queries, *memory, bias=memory_bias)
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

    def begin(self, memory: Float[Array, "batch memory width"], length: int) -> Cache:
        """An empty cache with room for ``length`` tokens about a memory."""
        graph, state = nnx.split(self.blocks)

        def body(_: None, weights: nnx.State) -> tuple[None, list[jax.Array]]:
            return None, [x.swapaxes(1, 2) for x in nnx.merge(graph, weights).remember(memory)]

        _, (keys, values) = jax.lax.scan(body, None, state)
        *first, _, dim = keys.shape
        empty = jnp.zeros((*first, length, dim), keys.dtype)
        return Cache(empty, empty, keys, values)

    def advance(
        self,
        cache: Cache,
        token: Float[Array, "batch width"],
        position: Int[Array, ""],
        *,
        memory_mask: Bool[Array, "batch memory"] | None = None,
    ) -> tuple[Cache, Float[Array, "batch width"]]:
        """One more token of a causal decoder: its keys and values join the cache.

        Args:
            cache: of ``begin`` or the call before.
            token: embedded, its position added.
            position: how many tokens the cache holds.
            memory_mask: false where the memory is padding.
        """
        graph, state = nnx.split(self.blocks)
        room = jnp.arange(cache.keys.shape[3])
        bias = jnp.where(room <= position, 0.0, -jnp.inf)[None, None, None, :]
        memory_bias = hidden(memory_mask)

        def body(x: jax.Array, layer: tuple) -> tuple[jax.Array, tuple]:
            weights, keys, values, *memory = layer
            block = nnx.merge(graph, weights)
            query, key, value = block.project(x)
            keys = jax.lax.dynamic_update_index_in_dim(keys, key[:, 0], position, 2)
            values = jax.lax.dynamic_update_index_in_dim(values, value[:, 0], position, 2)
            attended = layers.attention(query, _by_place(keys), _by_place(values), bias=bias)
            seen = [_by_place(x) for x in memory]
            return block.mix(x, attended, seen, memory_bias), (keys, values)

        # Unrolled: a loop would copy every layer's weights out of the stack for every token.
        layers_of = (state, *cache)
        x, (keys, values) = jax.lax.scan(body, token[:, None], layers_of, unroll=self.depth)
        return cache._replace(keys=keys, values=values), self.norm(x)[:, 0]

    def _causal_bias(self, length: int) -> Bias | None:
        if not self.causal:
            return None
        order = jnp.arange(length)
        return jnp.where(order[:, None] >= order[None, :], 0.0, -jnp.inf)[None, None]


def hidden(mask: Bool[Array, "batch keys"] | None) -> Bias | None:
    """What is added to scores so that no query sees a key whose mask is false."""
    return None if mask is None else jnp.where(mask, 0.0, -jnp.inf)[:, None, None, :]


def _by_place(x: Float[Array, "b h l k"]) -> Float[Array, "b l h k"]:
    return x.swapaxes(1, 2)


def _merged(heads: Float[Array, "b l h k"]) -> Float[Array, "b l d"]:
    return heads.reshape(*heads.shape[:2], -1)
