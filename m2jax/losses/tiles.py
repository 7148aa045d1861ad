# SPDX-License-Identifier: Apache-2.0
"""What one tile of logits contributes, for the softmax and for the sigmoid loss.

Both losses are a sum over rows (and columns) of the logits off the diagonal, plus terms of the
diagonal alone. A form says how a tile adds to the row and column sums, how partial sums join, and
what weight each logit has in the gradient. Masked logits are ``-inf`` and weigh nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from m2jax.losses.layout import scatter_sum

Axes = tuple[str, ...]


class Sums(NamedTuple):
    """``sum_j exp(logit_j - max)`` with its maximum: a sum that cannot overflow (Milakov 2018)."""

    max: jax.Array  # a constant of the derivative; -inf: nothing was summed
    sum: jax.Array


class Form(NamedTuple):
    """One loss as functions of a tile of logits [m, n]."""

    start: Callable[..., Any]  # (shape, dtype) -> sums of nothing
    rows: Callable[[jax.Array], Any]  # logits -> sums of each row [m]
    columns: Callable[[jax.Array], Any]  # logits -> sums of each column [n]
    join: Callable[[Any, Any], Any]  # sums of two disjoint sets
    collect: Callable[[Any, Axes], Any]  # (sums [n], axes) -> this device's share, joined over axes
    weights: Callable[
        [jax.Array, Any, Any], jax.Array
    ]  # (logits, row state, column state) -> [m, n]


def _nothing(shape: tuple[int, ...], dtype: Any) -> Sums:
    return Sums(jnp.full(shape, -jnp.inf, dtype), jnp.zeros(shape, dtype))


def finite(top: jax.Array) -> jax.Array:
    """A maximum that may be subtracted: exp(-inf - 0) is 0, exp(-inf + inf) is not a number."""
    return jnp.where(top == -jnp.inf, 0, top)


def _exp_sums(logits: jax.Array, axis: int) -> Sums:
    top = logits.max(axis)
    return Sums(top, jnp.exp(logits - jnp.expand_dims(finite(top), axis)).sum(axis))


def _join(a: Sums, b: Sums) -> Sums:
    top = jnp.maximum(a.max, b.max)
    shift = finite(top)
    return Sums(top, a.sum * jnp.exp(a.max - shift) + b.sum * jnp.exp(b.max - shift))


def _collect(sums: Sums, axes: Axes) -> Sums:
    """Joins over devices; each keeps its own part of the rows."""
    top = lax.pmax(sums.max, axes)
    scaled = sums.sum * jnp.exp(sums.max - finite(top))
    mine = scatter_sum(scaled, axes)
    at = lax.axis_index(axes) * len(mine)
    return Sums(lax.dynamic_slice_in_dim(top, at, len(mine)), mine)


def _softmax_weights(logits: jax.Array, row: Sums, column: Sums) -> jax.Array:
    """Derivative by each logit; a state has the (finite) maximum and the derivative by the sum."""
    by_row = jnp.exp(logits - row.max[:, None]) * row.sum[:, None]
    by_column = jnp.exp(logits - column.max[None, :]) * column.sum[None, :]
    return by_row + by_column


# Rows and columns each have a normaliser: both directions of the loss come from one tile.
SOFTMAX = Form(
    start=_nothing,
    rows=lambda logits: _exp_sums(logits, 1),
    columns=lambda logits: _exp_sums(logits, 0),
    join=_join,
    collect=_collect,
    weights=_softmax_weights,
)

# -log sigmoid(-x) = softplus(x) of every pair; rows alone see them all, so columns carry nothing.
SIGMOID = Form(
    start=lambda shape, dtype: jnp.zeros(shape, dtype),
    rows=lambda logits: jax.nn.softplus(logits).sum(1),
    columns=lambda logits: jnp.zeros(logits.shape[1], logits.dtype),
    join=jnp.add,
    collect=scatter_sum,
    weights=lambda logits, row, column: jax.nn.sigmoid(logits) * row[:, None],
)
