# SPDX-License-Identifier: Apache-2.0
"""Gradient accumulation for losses that compare rows with each other.

The mean of the micro-batches' losses is not the loss of the batch: rows of other micro-batches are
missing from it as negatives. Two passes mend that (Gao et al. 2021, GradCache): encode every
micro-batch and keep the features alone, take the loss and its gradient on all of them, then encode
each micro-batch once more and pull its part of that gradient back. Memory is one micro-batch's,
the price one more forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from m2jax.dist.sharding import BATCH_AXES, batch_shards

Tree = Any


def value_and_grad(
    encode: Callable[[Tree, Tree, jax.Array], Tree],
    contrast: Callable[[Tree, Tree, Tree], tuple[jax.Array, Tree]],
    *,
    count: int,
    mesh: Mesh | None = None,
    detach: bool = False,
) -> Callable[[Tree, Tree, jax.Array], tuple[tuple[jax.Array, Tree], Tree]]:
    """Like ``jax.value_and_grad`` of ``contrast`` on ``encode``, one micro-batch at a time.

    Args:
        encode: (parameters, rows, key) -> floating-point features [rows, ...] of each row alone, or
            [rows * n, ...] with those of a row beside each other.
        contrast: (parameters, features, batch) of the whole batch -> (loss, metrics).
        count: micro-batches; the rows of each device must divide by it.
        mesh: where the rows lie; each micro-batch takes an equal part of every device's.
        detach: the gradient reaches the encoder through the last micro-batch alone; the others
            serve as negatives, which saves their second pass. One reading of the M2-Encoder's
            "grouped ITC with batch accumulation", whose paper leaves this open; not the gradient
            of the loss.

    Returns:
        A function (parameters, batch, key) -> ((loss, metrics), gradient by the parameters). Each
        micro-batch is encoded with a key of its own, the same in both passes.
    """

    def function(params: Tree, batch: Tree, rng: jax.Array) -> tuple[tuple[jax.Array, Tree], Tree]:
        parts, keys = split(batch, count, mesh), jax.random.split(rng, count)
        if detach:
            return _last_alone(encode, contrast, params, batch, parts, keys, mesh)
        parts = (parts, keys)
        features = merge(lax.map(lambda part: encode(params, *part), parts), mesh)
        loss = jax.value_and_grad(contrast, argnums=(0, 1), has_aux=True)
        value, (grads, d_features) = loss(params, features, batch)

        def add(grads: Tree, part_and_change: Tree) -> tuple[Tree, None]:
            part, change = part_and_change
            _, pull = jax.vjp(lambda params: encode(params, *part), params)
            return jax.tree.map(jnp.add, grads, pull(change)[0]), None

        grads, _ = lax.scan(add, grads, (parts, split(d_features, count, mesh)))
        return value, grads

    return function


def _last_alone(
    encode: Callable,
    contrast: Callable,
    params: Tree,
    batch: Tree,
    parts: Tree,
    keys: jax.Array,
    mesh: Mesh | None,
) -> tuple[tuple[jax.Array, Tree], Tree]:
    """Value and gradient with the features of all but the last micro-batch held constant."""
    first, last = (
        jax.tree.map(lambda x: x[:-1], (parts, keys)),
        jax.tree.map(lambda x: x[-1], (parts, keys)),
    )
    constant = lax.map(lambda part: encode(params, *part), first)

    def loss(params: Tree) -> tuple[jax.Array, Tree]:
        live = encode(params, *last)
        features = jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), constant, live)
        return contrast(params, merge(features, mesh), batch)

    return jax.value_and_grad(loss, has_aux=True)(params)


def split(tree: Tree, count: int, mesh: Mesh | None = None) -> Tree:
    """[rows, ...] -> [count, rows / count, ...] without moving a row to another device."""

    def one(x: jax.Array) -> jax.Array:
        by_device = x.reshape(_devices(mesh), count, -1, *x.shape[1:])
        parts = by_device.swapaxes(0, 1).reshape(count, -1, *x.shape[1:])
        return _place(parts, mesh, axis=1)

    return jax.tree.map(one, tree)


def merge(tree: Tree, mesh: Mesh | None = None) -> Tree:
    """The inverse of ``split``."""

    def one(x: jax.Array) -> jax.Array:
        by_device = x.reshape(len(x), _devices(mesh), -1, *x.shape[2:])
        return _place(by_device.swapaxes(0, 1).reshape(-1, *x.shape[2:]), mesh, axis=0)

    return jax.tree.map(one, tree)


def _devices(mesh: Mesh | None) -> int:
    """How many parts the rows of a batch lie in."""
    return 1 if mesh is None else batch_shards(mesh.shape)


def _place(x: jax.Array, mesh: Mesh | None, axis: int) -> jax.Array:
    if mesh is None:
        return x
    rows = tuple(name for name in BATCH_AXES if name in mesh.axis_names)
    spec = PartitionSpec(*[None] * axis, rows)
    return lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
