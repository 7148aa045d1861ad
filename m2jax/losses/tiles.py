# SPDX-License-Identifier: Apache-2.0
"""What one tile of logits contributes, for the softmax and for the sigmoid loss.

Both losses are a sum over rows (and columns) of the logits off the diagonal, plus terms of the
diagonal alone. A form says how a tile adds to the row and column sums, how partial sums join, and
what weight each logit has in the gradient. Masked logits are ``-inf`` and weigh nothing.

A ``Kernel`` says how that is computed for one tile: here by XLA, which writes the tile's logits to
memory; in ``fused.py`` by kernels that do not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from m2jax.losses.layout import scatter_sum

Axes = tuple[str, ...]
PADDING = -(2**31)  # the id of rows that fill up the last tile


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
    total: Callable[[Any], Any]  # sums [k, ...] of k disjoint sets -> of all of them [...]
    collect: Callable[[Any, Axes], Any]  # (sums [n], axes) -> this device's share, joined over axes
    weights: Callable[
        [jax.Array, Any, Any], jax.Array
    ]  # (logits, row state, column state) -> [m, n]


class Rows(NamedTuple):
    """One side of a tile: rows of images, or of texts."""

    features: jax.Array  # [rows, dim], in the type of the products
    ids: jax.Array  # int32 [rows]
    state: Any = ()  # what the form's weights need to know of each row


class Kernel(NamedTuple):
    """How one tile is computed: functions of (form, its rows, its columns, scale, bias, padded).

    With ``padded`` some ids may be ``PADDING``; logits of these, and of equal ids, are ``-inf``.
    """

    sums: Callable[..., tuple[Any, Any]]  # -> sums of each row, sums of each column
    weights: Callable[..., tuple[jax.Array, jax.Array]]  # -> weights [m, n], rounded to the
    # features' type for the products; what they add up to in each row [m], not rounded
    typed: bool = True  # jax.shard_map can follow which of its values differ between devices


def _nothing(shape: tuple[int, ...], dtype: Any) -> Sums:
    return Sums(jnp.full(shape, -jnp.inf, dtype), jnp.zeros(shape, dtype))


def finite(top: jax.Array) -> jax.Array:
    """A maximum that may be subtracted: exp(-inf - 0) is 0, exp(-inf + inf) is not a number."""
    return jnp.where(top == -jnp.inf, 0, top)


def exp_sums(
    logits: Float[Array, "m n"], axis: int, exp: Callable[[jax.Array], jax.Array] = jnp.exp
) -> Sums:
    """Sums along an axis, by an exponential that a kernel may have of its own."""
    top = logits.max(axis)
    return Sums(top, exp(logits - jnp.expand_dims(finite(top), axis)).sum(axis))


def _join(a: Sums, b: Sums) -> Sums:
    top = jnp.maximum(a.max, b.max)
    shift = finite(top)
    return Sums(top, a.sum * jnp.exp(a.max - shift) + b.sum * jnp.exp(b.max - shift))


def _total(sums: Sums) -> Sums:
    top = sums.max.max(0)
    return Sums(top, (sums.sum * jnp.exp(sums.max - finite(top))).sum(0))


def _collect(sums: Sums, axes: Axes) -> Sums:
    """Joins over devices; each keeps its own part of the rows."""
    top = lax.pmax(sums.max, axes)
    scaled = sums.sum * jnp.exp(sums.max - finite(top))
    mine = scatter_sum(scaled, axes)
    at = lax.axis_index(axes) * len(mine)
    return Sums(lax.dynamic_slice_in_dim(top, at, len(mine)), mine)


def softmax_weights(
    logits: Float[Array, "m n"],
    row: Sums,
    column: Sums,
    exp: Callable[[jax.Array], jax.Array] = jnp.exp,
) -> Float[Array, "m n"]:
    """Derivative by each logit; a state has the (finite) maximum and the derivative by the sum."""
    by_row = exp(logits - row.max[:, None]) * row.sum[:, None]
    by_column = exp(logits - column.max[None, :]) * column.sum[None, :]
    return by_row + by_column


# Rows and columns each have a normaliser: both directions of the loss come from one tile.
SOFTMAX = Form(
    start=_nothing,
    rows=lambda logits: exp_sums(logits, 1),
    columns=lambda logits: exp_sums(logits, 0),
    join=_join,
    total=_total,
    collect=_collect,
    weights=softmax_weights,
)

# -log sigmoid(-x) = softplus(x) of every pair; rows alone see them all, so columns carry nothing.
SIGMOID = Form(
    start=lambda shape, dtype: jnp.zeros(shape, dtype),
    rows=lambda logits: jax.nn.softplus(logits).sum(1),
    columns=lambda logits: jnp.zeros(logits.shape[1], logits.dtype),
    join=jnp.add,
    total=lambda sums: sums.sum(0),
    collect=scatter_sum,
    weights=lambda logits, row, column: jax.nn.sigmoid(logits) * row[:, None],
)


def rounded(features: jax.Array, wire: Any) -> jax.Array:
    """Features rounded to a narrower type but kept in theirs; compilers may drop two casts."""
    if jnp.promote_types(wire, features.dtype) == wire:
        return features
    info = jnp.finfo(wire)
    return lax.reduce_precision(features, info.nexp, info.nmant)


def masked(
    logits: jax.Array, ours: jax.Array, theirs: jax.Array, *, padded: bool
) -> Float[Array, "m n"]:
    """Logits [m, n]; pairs of equal ids [m] and [n], and padding, are -inf."""
    ours, theirs = ours[:, None], theirs[None, :]
    keep = ours != theirs
    if padded:
        keep = keep & (ours != PADDING) & (theirs != PADDING)
    return jnp.where(keep, logits, -jnp.inf)


def product(a: jax.Array, b: jax.Array, wide: Any) -> jax.Array:
    """``a @ b``, added up in the type ``wide``."""
    return jnp.matmul(a, b, preferred_element_type=wide)


def _logits(
    rows: Rows, columns: Rows, scale: jax.Array, bias: jax.Array, *, padded: bool
) -> jax.Array:
    logits = scale * product(rows.features, columns.features.T, scale.dtype) + bias
    return masked(logits, rows.ids, columns.ids, padded=padded)


def _sums(
    form: Form, rows: Rows, columns: Rows, scale: jax.Array, bias: jax.Array, *, padded: bool
) -> tuple[Any, Any]:
    logits = _logits(rows, columns, scale, bias, padded=padded)
    return form.rows(logits), form.columns(logits)


def _weights(
    form: Form, rows: Rows, columns: Rows, scale: jax.Array, bias: jax.Array, *, padded: bool
) -> tuple[jax.Array, jax.Array]:
    logits = _logits(rows, columns, scale, bias, padded=padded)
    weights = form.weights(logits, rows.state, columns.state)
    return weights.astype(rows.features.dtype), weights.sum(1)


# Programs that XLA makes of the formulas; a tile of logits goes through memory several times.
XLA = Kernel(_sums, _weights)
