# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy over a large vocabulary without its logits: captions and masked words."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def linear_cross_entropy(
    hidden: Float[Array, "batch length dim"],
    table: Float[Array, "vocab dim"],
    target: Int[Array, "batch length"],
    weight: Float[Array, "batch length"],
    *,
    vocab_size: int | None = None,
    positions: int = 1,
) -> Float[Array, ""]:
    """Mean of ``-log softmax(hidden @ table.T)[target]`` over the tokens, by their weights.

    Logits exist for ``positions`` tokens of every row at a time and are made again in the backward
    pass, so memory is batch x positions x vocab instead of batch x length x vocab. The loop runs
    over positions because rows lie on different devices; a table split over the vocabulary leaves
    each device its own columns of logits, and the sums over them are the partitioner's.

    Args:
        hidden: last states of a decoder.
        table: one row per word, of the output (or the tied input) embedding.
        target: the word at each place; any number where the weight is 0.
        weight: 1 where a token counts, 0 where it does not (padding, unmasked words).
        vocab_size: rows of the table that are words; the rest is padding and gets no probability.
        positions: tokens of a row whose logits exist at once; all of them: nothing is made again.

    Returns:
        The mean in float32 (or wider), 0 where no token counts.
    """
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    length, words = hidden.shape[1], vocab_size or len(table)
    positions = min(positions, length)
    count = math.ceil(length / positions)
    pad = count * positions - length
    is_word = jnp.arange(len(table)) < words

    def cut(x: jax.Array) -> jax.Array:
        """[batch, length, ...] -> [count, batch, positions, ...]; what fills up weighs nothing."""
        x = jnp.pad(x, [(0, 0), (0, pad), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(len(x), count, positions, *x.shape[2:]), 1, 0)

    def of_part(table: jax.Array, h: jax.Array, t: jax.Array, w: jax.Array) -> jax.Array:
        logits = jnp.einsum("bpd,vd->bpv", h, table.astype(h.dtype), preferred_element_type=wide)
        logits = jnp.where(is_word, logits, -jnp.inf)
        # A sum over one-hot columns, where a gather would first collect a split vocabulary.
        own = jnp.where(jnp.arange(len(table)) == t[..., None], logits, 0).sum(-1)
        lost = jax.nn.logsumexp(logits, axis=-1) - own
        return jnp.where(w != 0, w * lost, 0).sum()

    again = of_part if count == 1 else jax.checkpoint(of_part)

    def body(total: jax.Array, part: tuple) -> tuple[jax.Array, None]:
        return total + again(table, *part), None

    parts = (cut(hidden), cut(target), cut(weight.astype(wide)))
    total, _ = jax.lax.scan(body, jnp.zeros((), wide), parts)
    return total / jnp.maximum(weight.astype(wide).sum(), 1)
