# SPDX-License-Identifier: Apache-2.0
"""k-reciprocal re-ranking (Zhong et al. 2017, "Re-ranking person re-identification").

Queries and gallery are one set of n images. Each image is described by its reciprocal neighbours
(who is near to me and I to them), widened by the neighbours' own where these agree, and smoothed
over its nearest; a pair's distance is the Jaccard distance of descriptions, mixed with the given
distance. A description has some tens of entries however large n is, so it is held sparsely; the
matrix of n x n distances of the published code is made tile by tile and never held.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jaxtyping import Array, Bool, Float, Int

from m2jax.config import UserError
from m2jax.tasks.neighbours import ROWS, TILE, nearest

BLOCK = 512  # images whose descriptions are made at once


class Settings(NamedTuple):
    """Of the method; the paper's defaults. DC-Former's evaluation takes (50, 15, 0.3)."""

    k1: int = 20  # reciprocal neighbours
    k2: int = 6  # neighbours that a description is averaged over
    weight: float = 0.3  # of the given distance; the rest is the Jaccard distance's
    half: bool = True  # hold descriptions in float16, as the published code does


def rerank(
    queries: Float[np.ndarray, "queries dim"],
    gallery: Float[np.ndarray, "gallery dim"],
    settings: Settings | None = None,
    *,
    tile: int = TILE,
) -> Float[np.ndarray, "queries gallery"]:
    """Re-ranked distances, all at once; ``rerank_rows`` has them query by query.

    Args:
        queries: features, of unit length as a rule.
        gallery: features.
        settings: of the method.
        tile: images at once on the device.

    Raises:
        UserError: settings that mean nothing.
    """
    return np.stack(list(rerank_rows(queries, gallery, settings, tile=tile)))


def rerank_rows(
    queries: Float[np.ndarray, "queries dim"],
    gallery: Float[np.ndarray, "gallery dim"],
    settings: Settings | None = None,
    *,
    tile: int = TILE,
) -> Iterator[Float[np.ndarray, " gallery"]]:
    """Re-ranked distances of the gallery to each query in turn."""
    settings = settings or Settings()
    if settings.k1 < 1 or settings.k2 < 1 or not 0 <= settings.weight <= 1:
        raise UserError(
            f"re-ranking: {settings}: k1 and k2 must be at least 1, the weight between 0 and 1"
        )
    images = np.concatenate([np.asarray(x, np.float32) for x in (queries, gallery)])
    near = nearest(images, images, settings.k1 + 1, tile=tile, rows=min(ROWS, tile))
    described = _descriptions(images, near.ids, near.farthest, settings)
    described = _smoothed(described, near.ids, settings)
    columns = described[len(queries) :].tocsc()
    for row, query in enumerate(images[: len(queries)]):
        given = np.concatenate(
            [
                np.asarray(_distances(query, block))
                for block in _blocks(images[len(queries) :], tile)
            ]
        )
        given = given[: len(gallery)] / near.farthest[row]
        jaccard = _jaccard(described, columns, row, len(gallery), settings)
        # The product stays in the description's precision, as in the published code.
        yield jaccard * (1 - settings.weight) + given * np.float32(settings.weight)


def _blocks(x: np.ndarray, size: int) -> Iterator[np.ndarray]:
    size = min(size, len(x))
    for first in range(0, len(x), size):
        block = x[first : first + size]
        yield np.pad(block, ((0, size - len(block)), (0, 0)))


@jax.jit
def _distances(query: Float[Array, " dim"], items: Float[Array, "i dim"]) -> Float[Array, " i"]:
    """Squared, in the form that the neighbours' have."""
    product = jnp.matmul(items, query, precision="highest")
    return jnp.square(query).sum() + jnp.square(items).sum(1) - 2 * product


def _descriptions(
    images: np.ndarray, ids: np.ndarray, farthest: np.ndarray, settings: Settings
) -> scipy.sparse.csr_array:
    """Weights exp(-distance) over each image's widened reciprocal neighbours, of sum 1."""
    half = int(np.around(settings.k1 / 2))  # to even, as the published code rounds
    names, weights, counts = [], [], []
    table = jnp.asarray(ids)
    mutual, mutual_half = _mutual(table, ids.shape[1]), _mutual(table, half + 1)
    held = jnp.asarray(images)
    size = min(BLOCK, len(images))
    for first in range(0, len(images), size):
        rows = np.minimum(np.arange(first, first + size), len(images) - 1)
        found, real, near = _widened(table, mutual, mutual_half, held, rows)
        for row in range(min(size, len(images) - first)):
            some = np.asarray(real[row])
            given = np.asarray(near[row])[some] / farthest[first + row]
            weight = np.exp(-given)
            names.append(np.asarray(found[row])[some])
            weights.append(weight / weight.sum())
            counts.append(len(weight))
    data = np.concatenate(weights)
    data = data.astype(np.float16).astype(np.float32) if settings.half else data
    pointers = np.concatenate([[0], np.cumsum(counts)])
    shape = (len(images), len(images))
    return scipy.sparse.csr_array((data, np.concatenate(names), pointers), shape=shape)


@jax.jit(static_argnums=1)
def _mutual(ids: Int[Array, "n k"], k: int) -> Bool[Array, "n k"]:
    """Which of the first ``k`` neighbours of each image have it among their first ``k``."""
    near = ids[:, :k]

    def one(row: Array, neighbours: Array) -> Array:
        return (near[neighbours] == row).any(1)

    return jax.lax.map(lambda x: one(*x), (jnp.arange(len(ids)), near), batch_size=BLOCK)


@jax.jit
def _widened(
    ids: Int[Array, "n k"],
    mutual: Bool[Array, "n k"],
    mutual_half: Bool[Array, "n h"],
    images: Float[Array, "n dim"],
    rows: Int[Array, " b"],
) -> tuple[Int[Array, "b m"], Bool[Array, "b m"], Float[Array, "b m"]]:
    """Widened reciprocal neighbours of some images: names, which are real, distances.

    A reciprocal neighbour's own (half as far) join where more than 2/3 of them are ours already.
    """
    half = mutual_half.shape[1]
    own, ours = ids[rows], mutual[rows]  # [b, k]
    theirs, kept = ids[own, :half], mutual_half[own]  # [b, k, h]
    shared = ((theirs[..., None] == own[:, None, None]) & ours[:, None, None]).any(-1) & kept
    # More than 2/3, in integers: 3 shared > 2 theirs.
    joins = ours & (3 * shared.sum(-1) > 2 * kept.sum(-1))
    none = len(ids)
    names = jnp.concatenate(
        [
            jnp.where(ours, own, none),
            jnp.where(kept & joins[..., None], theirs, none).reshape(len(rows), -1),
        ],
        axis=1,
    )
    names = jnp.sort(names, axis=1)
    repeated = jnp.pad(names[:, 1:] == names[:, :-1], ((0, 0), (1, 0)))
    real = (names < none) & ~repeated
    names = jnp.where(real, names, 0)
    one = images[rows]
    product = jnp.einsum("bd,bmd->bm", one, images[names], precision="highest")
    square = jnp.square(images).sum(1)
    return names, real, square[rows][:, None] + square[names] - 2 * product


def _smoothed(
    described: scipy.sparse.csr_array, ids: np.ndarray, settings: Settings
) -> scipy.sparse.csr_array:
    """Each description is the mean of those of the image's nearest (itself is the first)."""
    k2 = min(settings.k2, ids.shape[1])
    if k2 == 1:
        return described
    n = len(ids)
    pointers = np.arange(n + 1) * k2
    ones = np.ones(n * k2, np.float32)
    which = scipy.sparse.csr_array((ones, ids[:, :k2].ravel(), pointers), shape=(n, n))
    total = scipy.sparse.csr_array(which @ described)
    total.data = (total.data / np.float32(k2)).astype(np.float32)
    if settings.half:
        total.data = total.data.astype(np.float16).astype(np.float32)
    total.sort_indices()
    return total


def _jaccard(
    described: scipy.sparse.csr_array,
    columns: scipy.sparse.csc_array,
    row: int,
    gallery: int,
    settings: Settings,
) -> Float[np.ndarray, " gallery"]:
    """1 - shared / (2 - shared), where shared sums the smaller weight of each name."""
    kind = np.float16 if settings.half else np.float32
    shared = np.zeros(gallery, kind)
    pointers, indices = np.asarray(described.indptr), np.asarray(described.indices)
    own = slice(pointers[row], pointers[row + 1])
    names, weights = indices[own], described.data[own]
    starts, items = np.asarray(columns.indptr), np.asarray(columns.indices)
    for name, weight in zip(names, weights, strict=True):
        some = slice(starts[name], starts[name + 1])
        shared[items[some]] += np.minimum(weight, columns.data[some]).astype(kind)
    return 1 - shared / (2 - shared)
