# SPDX-License-Identifier: Apache-2.0
"""Where the right items of each query stand in a ranking of millions, without the ranking.

Every metric of instance retrieval needs only the ranks of a query's right items among those that
count. A rank is a number of scores that are not lower, so the matrix of scores is never held, let
alone sorted: it is made tile by tile on the device, twice, once to read the right items' scores
and once to count. One compiled program makes the scores of both passes, so both see the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from m2jax.config import UserError

METRICS = ("cosine", "euclid")
TILE = 8192  # items of one tile
ROWS = 1024  # queries of one tile: 32 MB of scores with it

Lists = Sequence[Sequence[int] | Int[np.ndarray, " some"]]  # rows of items, per query


class Hits(NamedTuple):
    """The right items of each query in a ranking."""

    ranks: list[Int[np.ndarray, " found"]]  # from 0, rising; items that do not count are no rank
    totals: Int[np.ndarray, " queries"]  # right items of each query, found or not


class Scores(Protocol):
    """Scores of items for queries, higher first, made a tile at a time."""

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of queries and of items."""
        ...

    def tile(self, rows: Int[np.ndarray, " some"], first: int, size: int) -> Float[Array, "q i"]:
        """Scores of some queries for items ``first:first + size``; -inf past the last item."""
        ...


class FeatureScores:
    """Scores from features, which may be memory-mapped: items go to the device tile by tile.

    Args:
        queries: [queries, dim].
        items: [items, dim].
        metric: ``cosine``, or ``euclid`` for the order of rising Euclidean distance.

    Raises:
        UserError: sizes that do not fit, or an unknown metric.
    """

    def __init__(
        self,
        queries: Float[np.ndarray, "queries dim"],
        items: Float[np.ndarray, "items dim"],
        metric: str = "cosine",
    ) -> None:
        if queries.ndim != 2 or items.ndim != 2 or queries.shape[1] != items.shape[1]:
            raise UserError(
                f"ranking: queries {queries.shape} and gallery {items.shape} do not fit: "
                "give [n, dim] of one dim"
            )
        if metric not in METRICS:
            raise UserError(f"ranking: metric {metric!r}: use one of {', '.join(METRICS)}")
        self._queries, self._items, self._metric = queries, items, metric

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of queries and of items."""
        return len(self._queries), len(self._items)

    def tile(self, rows: Int[np.ndarray, " some"], first: int, size: int) -> Float[Array, "q i"]:
        """See ``Scores``."""
        found = np.asarray(self._items[first : first + size], np.float32)
        padded = np.pad(found, ((0, size - len(found)), (0, 0)))
        queries = np.asarray(self._queries[rows], np.float32)
        return _scores(queries, padded, len(found), euclid=self._metric == "euclid")


class MatrixScores:
    """Scores from a matrix of distances that there is already (re-ranked ones, say)."""

    def __init__(self, distances: Float[np.ndarray, "queries items"]) -> None:
        self._distances = distances

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of queries and of items."""
        queries, items = self._distances.shape
        return queries, items

    def tile(self, rows: Int[np.ndarray, " some"], first: int, size: int) -> Float[Array, "q i"]:
        """See ``Scores``."""
        found = -np.asarray(self._distances[rows, first : first + size], np.float32)
        widths = ((0, 0), (0, size - found.shape[1]))
        return jnp.asarray(np.pad(found, widths, constant_values=-np.inf))


@jax.jit
def _unit(x: Float[Array, "n dim"]) -> Float[Array, "n dim"]:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-12)


@jax.jit(static_argnames="euclid")
def _scores(
    queries: Float[Array, "q dim"], items: Float[Array, "i dim"], count: int, *, euclid: bool
) -> Float[Array, "q i"]:
    """Cosines; or q.g - |g|^2 / 2, which falls as |q - g| rises, for the query is the same."""
    if not euclid:
        queries, items = _unit(queries), _unit(items)
    table = jnp.matmul(queries, items.T, precision="highest")
    if euclid:
        table = table - 0.5 * jnp.square(items).sum(1)
    return jnp.where(jnp.arange(len(items)) < count, table, -jnp.inf)


def hits(
    scores: Scores,
    right: Lists,
    ignored: Lists | None = None,
    *,
    tile: int = TILE,
    rows: int = ROWS,
) -> Hits:
    """Ranks of the right items of each query among all items but the ignored ones.

    Ties count against the query: a wrong item with the same score stands before the right one.

    Args:
        scores: of all items for all queries.
        right: per query, rows of its right items.
        ignored: per query, rows of items that are taken out of its ranking; none if not given.
        tile: items at once.
        rows: queries at once.

    Raises:
        UserError: a score is not a number, an item is out of range, or right and ignored at once.
    """
    queries, items = scores.shape
    right = [np.asarray(each, np.int64) for each in right]
    ignored = [np.asarray(each, np.int64) for each in ignored or [()] * queries]
    _check(right, ignored, queries, items)
    found: list[np.ndarray] = [np.zeros(0, np.int64)] * queries
    totals = np.array([len(each) for each in right], np.int64)
    # Queries with as many right items are gone through together: little padding.
    order = np.argsort(-totals, kind="stable")
    order = order[totals[order] > 0]
    tile = min(tile, items)
    for start in range(0, len(order), rows):
        chunk = order[start : start + rows]
        padded = np.resize(chunk, min(rows, len(order)))  # one shape, compiled once
        wanted = _padded([right[row] for row in padded])
        dropped = _padded([ignored[row] for row in padded])
        ranks = _ranks(scores, padded, wanted, dropped, tile)
        for row, each in zip(chunk, ranks, strict=False):
            found[row] = each[: totals[row]].astype(np.int64)
    return Hits(found, totals)


def _check(
    right: Sequence[np.ndarray], ignored: Sequence[np.ndarray], queries: int, items: int
) -> None:
    if not len(right) == len(ignored) == queries:
        raise UserError(
            f"ranking: {queries} queries but {len(right)} lists of right items and "
            f"{len(ignored)} of ignored ones: give one of each per query"
        )
    for query, (good, bad) in enumerate(zip(right, ignored, strict=True)):
        for each in (good, bad):
            if each.size and not 0 <= each.min() <= each.max() < items:
                raise UserError(
                    f"ranking: query {query} names an item outside 0..{items - 1}: "
                    "mend the ground truth"
                )
            if len(np.unique(each)) < len(each):
                raise UserError(f"ranking: query {query} names an item twice: name it once")
        if len(np.intersect1d(good, bad)):
            raise UserError(
                f"ranking: an item of query {query} is right and ignored at once: choose one"
            )


def _padded(lists: Sequence[np.ndarray]) -> Int[np.ndarray, "queries most"]:
    """Lists as an array filled up with -1; widths are powers of two, so few shapes compile."""
    most = max((len(each) for each in lists), default=0)
    wide = np.full((len(lists), 1 << max(most - 1, 0).bit_length()), -1, np.int32)
    for row, each in enumerate(lists):
        wide[row, : len(each)] = each
    return wide


def _ranks(
    scores: Scores, rows: np.ndarray, wanted: np.ndarray, dropped: np.ndarray, tile: int
) -> Int[np.ndarray, "queries most"]:
    """Ranks of the wanted items of some queries."""
    starts = range(0, scores.shape[1], tile)
    good = jnp.full(wanted.shape, -jnp.inf)
    bad = jnp.full(dropped.shape, -jnp.inf)
    broken = jnp.zeros((), jnp.bool_)
    for first in starts:
        table = scores.tile(rows, first, tile)
        good, bad, broken = _read(table, first, wanted, dropped, good, bad, broken)
    if broken:
        raise UserError("ranking: a score is not a number: the features are broken")
    good = -jnp.sort(-good, axis=1)
    before = jnp.zeros(good.shape, jnp.int32)
    for first in starts:
        before = _count(scores.tile(rows, first, tile), good, before)
    return np.asarray(_settle(before, good, bad))


@jax.jit
def _read(
    table: Float[Array, "q i"],
    first: int,
    wanted: Int[Array, "q w"],
    dropped: Int[Array, "q d"],
    good: Float[Array, "q w"],
    bad: Float[Array, "q d"],
    broken: Bool[Array, ""],
) -> tuple[Float[Array, "q w"], Float[Array, "q d"], Bool[Array, ""]]:
    """Scores of named items, those in this tile filled in."""
    size = table.shape[1]

    def take(named: Array, so_far: Array) -> Array:
        place = named - first
        here = (named >= 0) & (place >= 0) & (place < size)
        taken = jnp.take_along_axis(table, jnp.clip(place, 0, size - 1), axis=1)
        return jnp.where(here, taken, so_far)

    return take(wanted, good), take(dropped, bad), broken | jnp.isnan(table).any()


@jax.jit
def _count(
    table: Float[Array, "q i"], good: Float[Array, "q w"], before: Int[Array, "q w"]
) -> Int[Array, "q w"]:
    """Adds the items of a tile whose scores are not below a right item's."""
    found = jax.lax.map(lambda each: (table >= each[:, None]).sum(1, jnp.int32), good.T)
    return before + found.T


@jax.jit
def _settle(
    before: Int[Array, "q w"], good: Float[Array, "q w"], bad: Float[Array, "q d"]
) -> Int[Array, "q w"]:
    """Ranks from counts over all items: wrong ones that count, then right ones by their order."""

    def own(named: Array) -> Array:
        return jax.lax.map(lambda each: (named >= each[:, None]).sum(1, jnp.int32), good.T).T

    return before - own(good) - own(bad) + jnp.arange(good.shape[1])


def hits_in_lists(
    ranked: Int[np.ndarray, "queries listed"], right: Lists, ignored: Lists | None = None
) -> Hits:
    """The same from rankings that there are already, whole or their beginnings alone.

    Args:
        ranked: per query, rows of items, best first.
        right: per query, rows of its right items; those not listed get no rank.
        ignored: per query, rows of items that are taken out of its ranking.

    Raises:
        UserError: a list for some other number of queries.
    """
    ignored = ignored or [()] * len(ranked)
    if not len(ranked) == len(right) == len(ignored):
        raise UserError(
            f"ranking: {len(ranked)} rankings but {len(right)} lists of right items and "
            f"{len(ignored)} of ignored ones: give one of each per query"
        )
    found = []
    for row, good, bad in zip(ranked, right, ignored, strict=True):
        counts = ~np.isin(row, np.asarray(bad, np.int64))
        is_right = np.isin(row, np.asarray(good, np.int64))
        found.append((np.cumsum(counts) - 1)[is_right & counts].astype(np.int64))
    return Hits(found, np.array([len(each) for each in right], np.int64))


def rows_of(mask: Shaped[np.ndarray, "queries items"]) -> list[np.ndarray]:
    """Lists of rows from a mask."""
    return [np.flatnonzero(row) for row in mask]
