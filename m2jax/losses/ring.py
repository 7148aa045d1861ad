# SPDX-License-Identifier: Apache-2.0
"""Exact sums over all pairs of rows that lie on many devices, never holding the matrix of logits.

Image rows travel round the rings of a ``Layout`` in slices of at most ``tile`` rows; text rows are
gathered over its held axes and stay, in tiles of several slices. Each slice meets every held tile,
and from one tile of logits both directions of the loss take their sums (an online log-sum-exp in
each, as in Milakov and Gimelshein 2018), so rows are sent once for the two. The backward pass makes
the tiles again from the sums (as Dao et al. 2022 do for attention): slices go round once more, each
with the gradient gathered so far, and arrive home with all of it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from m2jax.losses.layout import Layout, gather, scatter_sum
from m2jax.losses.tiles import PADDING, XLA, Form, Kernel, Rows, Sums, finite, product, rounded

BREADTH = 4  # a tile's columns per row: few rows keep the travelling buffers small


class Pairs(NamedTuple):
    """How the pairs are gone through; all of it is known when the program is traced."""

    layout: Layout
    form: Form
    tile: int  # most rows of a slice
    wire: Any  # type of features between devices and in products, which add up in >= float32
    kernel: Kernel = XLA  # what computes a tile


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def pair_sums(
    pairs: Pairs,
    image: Float[Array, "batch dim"],
    text: Float[Array, "batch dim"],
    ids: Int[Array, " batch"],
    scale: Float[Array, ""],
    bias: Float[Array, ""],
) -> tuple[Any, Any]:
    """Sums over the logits ``scale * image @ text.T + bias`` of each row and of each column.

    Pairs of equal ``ids`` are left out, so each row's own pair is.

    Returns:
        The form's sums per image row and per text row, lying as the rows do. Softmax sums are
        relative to a maximum that differentiation must take for a constant.
    """
    return _sums(pairs, image, text, ids, scale, bias)


def _sums(pairs: Pairs, *arrays: jax.Array) -> tuple[Any, Any]:
    rows = pairs.layout.row_spec
    body = functools.partial(_forward, pairs)
    return on_devices(pairs, body, (rows, rows, rows, *[PartitionSpec()] * 2), (rows, rows))(
        *arrays
    )


def _sums_fwd(pairs: Pairs, *arrays: jax.Array) -> tuple[Any, Any]:
    sums = _sums(pairs, *arrays)
    return sums, (arrays, sums)


def _sums_bwd(pairs: Pairs, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    arrays, sums = residuals
    # The derivative needs the maximum of the sums and the cotangent of the rest.
    states = [
        Sums(finite(total.max), change.sum) if isinstance(total, Sums) else change
        for total, change in zip(sums, cotangents, strict=True)
    ]
    rows, whole = pairs.layout.row_spec, PartitionSpec()
    body = functools.partial(_backward, pairs)
    d_image, d_text, d_scale, d_bias = on_devices(
        pairs, body, (rows, rows, rows, whole, whole, rows, rows), (rows, rows, whole, whole)
    )(*arrays, *states)
    image, text = arrays[:2]
    return d_image.astype(image.dtype), d_text.astype(text.dtype), None, d_scale, d_bias


pair_sums.defvjp(_sums_fwd, _sums_bwd)


def on_devices(pairs: Pairs, body: Callable, inputs: tuple, outputs: tuple) -> Callable:
    """The body on every device of the layout, or as it is on one device."""
    if pairs.layout.mesh is None:
        return body
    return jax.shard_map(
        body,
        mesh=pairs.layout.mesh,
        in_specs=inputs,
        out_specs=outputs,
        check_vma=pairs.kernel.typed,
    )


def _forward(
    pairs: Pairs,
    image: jax.Array,
    text: jax.Array,
    ids: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
) -> tuple[Any, Any]:
    """One device's share of the sums: its own image rows and text rows."""
    form, rows = pairs.form, len(image)
    moving = jax.tree.map(functools.partial(_slices, pairs), Rows(image, ids))
    held = _held(pairs, Rows(text.astype(pairs.wire), ids))
    padded = moving.ids.size != rows

    def visit(block: Any, columns: Any) -> tuple[Any, Any]:
        """A slice meets every held tile: sums of its rows, and the columns' sums so far."""

        def tile(at: jax.Array, carry: Any) -> Any:
            totals, columns = carry
            row, column = pairs.kernel.sums(form, block, _at(held, at), scale, bias, padded=padded)
            column = form.join(_at(columns, at), column)
            return form.join(totals, row), _put(columns, column, at)

        start = _varying(pairs, form.start(block.ids.shape, scale.dtype))
        return lax.fori_loop(0, len(held.ids), tile, (start, columns))

    def send(columns: Any, block: Any) -> tuple[Any, Any]:
        # One slice at a time: all of them in another type would stay in memory beside the rows.
        block = block._replace(features=rounded(block.features, pairs.wire).astype(pairs.wire))
        totals, columns = go_round(pairs.layout.rings, block, columns, visit, form.join)
        return columns, totals

    columns = _varying(pairs, form.start(held.ids.shape, scale.dtype))
    columns, totals = lax.scan(send, columns, moving)
    totals, columns = jax.tree.map(lambda x: x.reshape(-1), (totals, columns))
    if pairs.layout.held:
        columns = form.collect(columns, pairs.layout.held)
    return jax.tree.map(lambda x: x[:rows], (totals, columns))


def _backward(
    pairs: Pairs,
    image: jax.Array,
    text: jax.Array,
    ids: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    row_state: Any,
    column_state: Any,
) -> tuple[jax.Array, ...]:
    """One device's share of the gradients, from the states of its own rows."""
    form, rows, wide = pairs.form, len(image), scale.dtype
    moving = jax.tree.map(functools.partial(_slices, pairs), Rows(image, ids, row_state))
    held = _held(pairs, Rows(text.astype(pairs.wire), ids, column_state))
    padded = moving.ids.size != rows

    def visit(block: Any, d_held: jax.Array) -> tuple[Any, Any]:
        """A slice meets every held tile: its own gradient, and the held rows' so far."""

        def tile(at: jax.Array, carry: Any) -> Any:
            (d_block, total), d_held = carry
            against = _at(held, at)
            weights, added = pairs.kernel.weights(form, block, against, scale, bias, padded=padded)
            d_block = d_block + product(weights, against.features, wide)
            d_tile = _at(d_held, at) + product(weights.T, block.features, wide)
            return (d_block, total + added), _put(d_held, d_tile, at)

        zeros = jnp.zeros(block.features.shape, wide), jnp.zeros(block.ids.shape, wide)
        return lax.fori_loop(0, len(held.ids), tile, (_varying(pairs, zeros), d_held))

    def send(d_held: Any, block: Any) -> tuple[Any, Any]:
        add = functools.partial(jax.tree.map, jnp.add)
        features = rounded(block.features, pairs.wire)
        block = block._replace(features=features.astype(pairs.wire))
        (d_block, total), d_held = go_round(pairs.layout.rings, block, d_held, visit, add)
        return d_held, (d_block, total, (features.astype(wide) * d_block).sum())

    d_text = _varying(pairs, jnp.zeros(held.features.shape, wide))
    d_text, (d_image, total, d_scale) = lax.scan(send, d_text, moving)
    d_text = d_text.reshape(-1, text.shape[1])
    d_text = scatter_sum(d_text, pairs.layout.held)
    d_image = d_image.reshape(-1, image.shape[1])[:rows]
    d_scale, d_bias = d_scale.sum(), total.reshape(-1)[:rows].sum()
    if pairs.layout.mesh is not None:
        d_scale, d_bias = lax.psum((d_scale, d_bias), pairs.layout.rows)
    return scale * d_image, scale * d_text[:rows], d_scale, d_bias


def go_round(
    rings: tuple[tuple[str, ...], ...], block: Any, held: Any, visit: Callable, join: Callable
) -> tuple[Any, Any]:
    """Takes a block to every device of the rings; what they add to it comes home, joined.

    Blocks go on while they are worked on, and so do the additions to the block before, so no hop
    waits for a product. With several rings a block goes round the inner ones at each stop of the
    outer, whose hop has that long. Exactly n - 1 hops of the block and of its additions per ring.

    Args:
        rings: axes of each ring, outer first.
        block: this device's.
        held: what stays here and changes at each visit.
        visit: (block, held) -> (addition, held).
        join: of two additions.

    Returns:
        (all additions to this device's block, held after every block was here).
    """
    if not rings:
        return visit(block, held)
    axes, inner = rings[0], rings[1:]
    stops = lax.axis_size(axes)
    forth = [(i, (i + 1) % stops) for i in range(stops)]

    def pass_on(tree: Any) -> Any:
        return jax.tree.map(lambda x: lax.ppermute(x, axes, forth), tree)

    def stop(block: Any, so_far: Any, held: Any, *, last: bool) -> tuple[Any, Any, Any]:
        onward = block if last else pass_on(block)
        arrived = None if so_far is None else pass_on(so_far)
        added, held = go_round(inner, block, held, visit, join)
        return onward, added if arrived is None else join(arrived, added), held

    own, held = go_round(inner, block, held, visit, join)
    carry = stop(pass_on(block), None, held, last=stops == 2)
    if stops > 3:
        carry = lax.fori_loop(2, stops - 1, lambda _, c: stop(*c, last=False), carry)
    if stops > 2:
        carry = stop(*carry, last=True)
    _, added, held = carry
    return join(own, pass_on(added)), held


def _slices(pairs: Pairs, x: jax.Array) -> jax.Array:
    """[rows, ...] -> [slices, at most ``tile``, ...], filled up with zeros or padding ids."""
    count = math.ceil(len(x) / pairs.tile)
    size = math.ceil(len(x) / count)
    fill = PADDING if jnp.issubdtype(x.dtype, jnp.integer) else 0
    widths = [(0, count * size - len(x)), *[(0, 0)] * (x.ndim - 1)]
    return jnp.pad(x, widths, constant_values=fill).reshape(count, size, *x.shape[1:])


def _held(pairs: Pairs, tree: Any) -> Any:
    """Gathers the slices over the held axes and joins them into tiles of ``BREADTH`` slices."""

    def tiles(x: jax.Array) -> jax.Array:
        x = gather(_slices(pairs, x), pairs.layout.held)
        fitting = [k for k in range(1, len(x) + 1) if not len(x) % k]
        together = max(k for k in fitting if k == 1 or k * x.shape[1] <= BREADTH * pairs.tile)
        return x.reshape(len(x) // together, together * x.shape[1], *x.shape[2:])

    return jax.tree.map(tiles, tree)


def _varying(pairs: Pairs, tree: Any) -> Any:
    """Constants that a loop will fill with values that differ from device to device."""
    if pairs.layout.mesh is None:
        return tree
    return jax.tree.map(lambda x: lax.pcast(x, pairs.layout.rows, to="varying"), tree)


def _at(tree: Any, index: jax.Array) -> Any:
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, keepdims=False), tree)


def _put(tree: Any, part: Any, index: jax.Array) -> Any:
    return jax.tree.map(lambda x, y: lax.dynamic_update_index_in_dim(x, y, index, 0), tree, part)
