# SPDX-License-Identifier: Apache-2.0
"""A causal decoder one token at a time, on the keys and values of the tokens so far.

What does not change from token to token is made ready once, outside of the loop over tokens: every
layer's weights are cut out of their stack and rounded, and the memory's keys and values lie as the
products want them. Inside the loop each of these would be a copy per token, of as many bytes as the
products themselves read.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from m2jax.models import layers
from m2jax.models.decoder import Bias, Decoder, hidden


class Pairs(NamedTuple):
    """Keys and values of one layer, the summed axis of either product next to last."""

    keys: Float[Array, "rows heads dim places"]
    values: Float[Array, "rows heads places dim"]


Past = tuple[Pairs, ...]  # of every layer: the tokens so far


class Stepper:
    """A decoder about to write about a memory.

    Args:
        decoder: a causal one.
        memory: what its layers attend to besides the tokens.
        memory_mask: false where the memory is padding.
    """

    def __init__(
        self,
        decoder: Decoder,
        memory: Float[Array, "batch memory width"],
        *,
        memory_mask: Bool[Array, "batch memory"] | None = None,
    ):
        graph, state = nnx.split(decoder.blocks)

        def layer(index: int) -> nnx.State:
            # Kernels are used in the precision of the tokens; scales and biases are small.
            return jax.tree.map(
                lambda w: w[index].astype(memory.dtype) if w.ndim > 2 else w[index], state
            )

        self.norm = decoder.norm
        self.blocks = [nnx.merge(graph, layer(index)) for index in range(decoder.depth)]
        self.memory = [_pairs(*block.remember(memory)) for block in self.blocks]
        self.memory_bias = hidden(memory_mask)

    def begin(self, rows: int, length: int) -> Past:
        """An empty past with room for ``length`` tokens of so many rows."""
        _, heads, dim, _ = self.memory[0].keys.shape
        dtype = self.memory[0].keys.dtype
        keys = jnp.zeros((rows, heads, dim, length), dtype)
        values = jnp.zeros((rows, heads, length, dim), dtype)
        return (Pairs(keys, values),) * len(self.blocks)

    def __call__(
        self, past: Past, token: Float[Array, "rows width"], position: Int[Array, ""]
    ) -> tuple[Past, Float[Array, "rows width"]]:
        """The state behind one more token, whose keys and values join the past.

        Args:
            past: of ``begin`` or the call before.
            token: embedded, its position added. There may be several rows for each of the memory,
                those of one beside each other: they share its keys and values.
            position: how many tokens the past holds.
        """
        places = jnp.arange(past[0].keys.shape[-1])
        bias = jnp.where(places <= position, 0.0, -jnp.inf)[None, None, None, :]
        x, grown = token[:, None], []
        for block, memory, (keys, values) in zip(self.blocks, self.memory, past, strict=True):
            query, key, value = block.project(x)
            seen = Pairs(
                jax.lax.dynamic_update_index_in_dim(keys, key[:, 0], position, 3),
                jax.lax.dynamic_update_index_in_dim(values, value[:, 0], position, 2),
            )
            grown.append(seen)
            x, asked = block.ask(x, _attend(query, seen, bias))
            together = asked.reshape(len(memory.keys), -1, *asked.shape[2:])
            found = _attend(together, memory, self.memory_bias)
            x = block.answer(x, found.reshape(asked.shape))
        return tuple(grown), self.norm(x)[:, 0]


def _pairs(keys: Float[Array, "b l h k"], values: Float[Array, "b l h k"]) -> Pairs:
    return Pairs(keys.transpose(0, 2, 3, 1), values.transpose(0, 2, 1, 3))


def _attend(
    queries: Float[Array, "b q h k"], seen: Pairs, bias: Bias | None
) -> Float[Array, "b q h k"]:
    """``layers.attention`` for few queries, on keys and values that lie as a past keeps them."""
    scores = jnp.einsum("bqhk,bhkl->bhql", queries * queries.shape[-1] ** -0.5, seen.keys)
    scores = scores.astype(layers.at_least_float32(scores.dtype))
    if bias is not None:
        scores = scores + bias.astype(scores.dtype)
    weights = jax.nn.softmax(scores, axis=-1).astype(seen.values.dtype)
    return jnp.einsum("bhql,bhlk->bqhk", weights, seen.values)
