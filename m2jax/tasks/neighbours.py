# SPDX-License-Identifier: Apache-2.0
"""Exact nearest neighbours among millions, a tile of distances at a time on the device."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

TILE = 8192  # items at once
ROWS = 1024  # queries at once
SPARE = 8  # more neighbours than asked for are looked at again in float64


class Nearest(NamedTuple):
    """The nearest items of each query, by squared Euclidean distance."""

    ids: Int[np.ndarray, "queries k"]  # nearest first; of equal distances the lower row first
    distances: Float[np.ndarray, "queries k"]  # squared
    farthest: Float[np.ndarray, " queries"]  # squared distance of the farthest item of all


def nearest(
    queries: Float[np.ndarray, "queries dim"],
    items: Float[np.ndarray, "items dim"],
    k: int,
    *,
    tile: int = TILE,
    rows: int = ROWS,
) -> Nearest:
    """The ``k`` nearest items of every query (all of them where there are fewer).

    Memory on the device: one tile of items, one of distances; both may be memory-mapped. Products
    in float32 tell distances apart to 1e-7 of the vectors' squares; the nearest are therefore
    measured again in float64 and put in their order on the host.
    """
    wanted, tile, rows = min(k, len(items)), min(tile, len(items)), min(rows, len(queries))
    k = min(k + SPARE, len(items))
    found: list[tuple[np.ndarray, ...]] = []
    for start in range(0, len(queries), rows):
        part = np.asarray(queries[start : start + rows], np.float32)
        count = len(part)
        part = jnp.asarray(np.pad(part, ((0, rows - count), (0, 0))))
        so_far = (
            jnp.full((rows, k), jnp.inf),
            jnp.full((rows, k), -1, jnp.int32),
            jnp.full(rows, -jnp.inf),
        )
        for first in range(0, len(items), tile):
            block = np.asarray(items[first : first + tile], np.float32)
            padded = np.pad(block, ((0, tile - len(block)), (0, 0)))
            so_far = _merge(part, padded, first, len(block), so_far)
        _, ids, farthest = (np.asarray(x)[:count] for x in so_far)
        found.append((*_ordered(queries[start : start + rows], items, ids, wanted), farthest))
    ids, distances, farthest = (np.concatenate(each) for each in zip(*found, strict=True))
    return Nearest(ids, distances, farthest)


def _ordered(
    queries: np.ndarray, items: np.ndarray, ids: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The ``k`` nearest of some candidates, and their distances, by differences in float64."""
    ids = np.sort(ids, axis=1)
    apart = np.empty(ids.shape)
    for row, query in enumerate(queries):
        apart[row] = np.square(np.asarray(items[ids[row]], np.float64) - query).sum(1)
    order = np.argsort(apart, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(apart, order, axis=1)


@jax.jit
def _merge(
    queries: Float[Array, "q dim"],
    items: Float[Array, "i dim"],
    first: int,
    count: int,
    so_far: tuple[Float[Array, "q k"], Int[Array, "q k"], Float[Array, " q"]],
) -> tuple[Float[Array, "q k"], Int[Array, "q k"], Float[Array, " q"]]:
    """The nearest of those so far and of one tile."""
    distances, ids, farthest = so_far
    real = jnp.arange(len(items)) < count
    table = jnp.square(queries).sum(1)[:, None] + jnp.square(items).sum(1)
    table = table - 2 * jnp.matmul(queries, items.T, precision="highest")
    farthest = jnp.maximum(farthest, jnp.where(real, table, -jnp.inf).max(1))
    here = first + jnp.broadcast_to(jnp.arange(len(items), dtype=jnp.int32), table.shape)
    both = jnp.concatenate([distances, jnp.where(real, table, jnp.inf)], axis=1)
    named = jnp.concatenate([ids, here], axis=1)
    near, where = jax.lax.top_k(-both, distances.shape[1])
    return -near, jnp.take_along_axis(named, where, axis=1), farthest
