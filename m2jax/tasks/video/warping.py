# SPDX-License-Identifier: Apache-2.0
"""Dynamic time warping: one monotone path through the whole map, cut at its stops.

As VCSL's benchmark has it (He et al., CVPR 2022). It finds one chain of segments at most, so no
copies in another order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from m2jax.tasks.video import paths
from m2jax.tasks.video.maps import Boxes, Map, stacks
from m2jax.tasks.video.paths import Path


@dataclass(frozen=True, kw_only=True)
class TimeWarping:
    """DTW with VCSL's settings."""

    discontinue: int = 3  # path points on one row or column that are no stop yet
    min_sim: float = 0.2  # mean similarity of a segment lies above it
    min_length: int = 5  # frames; segments are longer

    def __call__(self, maps: Sequence[Map]) -> list[Boxes]:
        """Segments of each map in order of time; ends inclusive."""
        return [
            paths.boxes(
                paths.segments_of(
                    path,
                    similarity,
                    longest=self.discontinue,
                    at_least=self.min_sim,
                    min_length=self.min_length,
                )
            )
            for path, similarity in zip(warping_paths(maps), maps, strict=True)
        ]


def warping_paths(maps: Sequence[Map]) -> list[Path]:
    """The cheapest path of each map from its first cell to its last; a step costs 1 - similarity.

    Costs are those of the maps' precision, added up in float64. Of equal predecessors the diagonal
    one is taken first, then the one above.
    """
    found: list[Path] = [np.zeros((0, 2), np.int64)] * len(maps)
    for members, stack in stacks(maps):
        came = _directions(stack)
        for row, number in enumerate(members):
            found[number] = _backtrace(came[row], maps[number].shape)
    return found


def _directions(stack: np.ndarray) -> np.ndarray:
    """Where the cheapest path to each cell comes from, [maps, rows, columns] int8."""
    count, n, m = stack.shape
    cost = (1 - stack).reshape(count, -1)
    came = np.zeros((count, n * m), np.int8)
    # Sums of the last two anti-diagonals by row, one place on: row -1 is at 0, and unreachable.
    last, before, new = (np.full((count, n + 1), np.inf) for _ in range(3))
    for rows, flat in paths.sweeps(n, m):
        above = slice(rows.start, rows.stop)
        here = slice(rows.start + 1, rows.stop + 1)
        diagonal, up, left = before[:, above], last[:, above], last[:, here]
        beside = np.minimum(up, left)
        least = np.minimum(diagonal, beside)
        if not flat.start:
            least = np.zeros((count, 1))  # the first cell
        new.fill(np.inf)
        np.add(cost[:, flat], least, out=new[:, here])
        came[:, flat] = (diagonal > beside) * (1 + (up > left)).astype(np.int8)
        last, before, new = new, last, before
    return came.reshape(stack.shape)


def _backtrace(came: np.ndarray, shape: tuple[int, ...]) -> Path:
    i, j = shape[0] - 1, shape[1] - 1
    points = [(i, j)]
    while i or j:
        down, right = paths.STEPS[came[i, j]]
        i, j = i - down, j - right
        points.append((i, j))
    return np.array(points[::-1], np.int64)
