# SPDX-License-Identifier: Apache-2.0
"""Paths through similarity maps: sweeps along anti-diagonals, and the cutting of paths.

Cells of an anti-diagonal do not depend on each other in dynamic programming over steps down,
right and diagonal, so each is computed at once, for all maps of a stack.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from m2jax.tasks.video.maps import Map

Path = Int64[np.ndarray, "points 2"]

DIAGONAL, UP, LEFT = range(3)  # where a path came from; -1: it starts here
STEPS = ((1, 1), (1, 0), (0, 1))  # back along each


class Sweep(NamedTuple):
    """An anti-diagonal of an array of maps [maps, rows, columns]."""

    rows: slice  # of the map
    flat: slice  # of a map's cells, flattened


def sweeps(rows: int, columns: int) -> Iterator[Sweep]:
    """Anti-diagonals from the first cell to the last; ``columns`` is at least 2."""
    for d in range(rows + columns - 1):
        first, last = max(0, d - columns + 1), min(d, rows - 1)
        step = columns - 1  # one row down and one column back
        yield Sweep(slice(first, last + 1), slice(d + first * step, d + last * step + 1, step))


def cut(path: Path, longest: int) -> list[tuple[int, int]]:
    """Ranges of a path between its stops; a stop stays on one row or column for too many points.

    Where a stop along a row and one along a column share their corner, a range is empty or runs
    backwards: the published code has it so, and drops it by its length.

    Args:
        path: points (query, reference) in order.
        longest: points of a run that are no stop yet.
    """
    stops = []
    for axis in range(2):
        changes = np.flatnonzero(np.diff(path[:, axis])) + 1
        starts, ends = np.append(0, changes), np.append(changes, len(path))
        long = ends - starts > longest
        stops += zip(starts[long].tolist(), ends[long].tolist(), strict=True)
    edges = [edge for stop in sorted(stops, key=lambda stop: stop[0]) for edge in stop]
    edges = edges[1:] if edges and edges[0] == 0 else [0, *edges]
    edges = edges[:-1] if edges and edges[-1] == len(path) else [*edges, len(path)]
    return list(zip(edges[::2], edges[1::2], strict=True))


def segments_of(
    path: Path, similarity: Map, *, longest: int, at_least: float, min_length: int
) -> list[list[int]]:
    """Boxes of the pieces of a path that are long and similar enough.

    Args:
        path: points (query, reference) in order.
        similarity: the map it runs through.
        longest: see ``cut``.
        at_least: mean similarity of a piece must lie above it.
        min_length: points, and frames of either video, must be more.
    """
    found = []
    for first, end in cut(path, longest):
        if end - first <= min_length:
            continue
        piece = path[first:end]
        start, stop = piece[0], piece[-1]
        if similarity[piece[:, 0], piece[:, 1]].mean() <= at_least:
            continue
        if (stop - start <= min_length).any():
            continue
        found.append([*start.tolist(), *stop.tolist()])
    return found


def boxes(found: Sequence[Sequence[int]]) -> Int64[np.ndarray, "segments 4"]:
    """Boxes as an array, of two axes even where there are none."""
    return np.array(found, np.int64).reshape(-1, 4)
