# SPDX-License-Identifier: Apache-2.0
"""Dynamic programming: paths that gain similarity, restarted after too many dissimilar steps.

As VCSL's benchmark has it (He et al., CVPR 2022; after Chou et al., TMM 2015), its mixed precision
included. Thresholds are on the scale similarity + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from m2jax.tasks.video import paths
from m2jax.tasks.video.maps import Boxes, Map, stacks

MOST_PATHS = 100


class Sums(NamedTuple):
    """What dynamic programming leaves at each cell of a map, or of a stack of them."""

    best: np.ndarray  # [..., rows, columns] similarity + 1 along the best path to here
    unmatched: np.ndarray  # int32: dissimilar steps in a row up to here
    came: np.ndarray  # int8: index in ``paths.STEPS`` of the step to here; -1: a path starts here


@dataclass(frozen=True, kw_only=True)
class DynamicProgramming:
    """DP with VCSL's settings."""

    discontinue: int = 3  # dissimilar steps in a row that a path survives
    min_sim: float = 1.0  # similarity + 1 below which a step is dissimilar
    ave_sim: float = 1.3  # mean similarity + 1 of a segment lies above it
    min_length: int = 5  # frames; segments are longer
    diagonal_thres: int = 30  # path points on one row or column that are no stop yet

    def __call__(self, maps: Sequence[Map]) -> list[Boxes]:
        """Segments of each map, those of the best path first; ends inclusive."""
        found: list[Boxes] = [paths.boxes([])] * len(maps)
        for members, stack in stacks([similarity + 1 for similarity in maps]):
            sums = accumulate(stack, min_sim=self.min_sim, discontinue=self.discontinue)
            for row, number in enumerate(members):
                n, m = maps[number].shape
                own = (part[row, :n, :m] for part in (stack, sums.best, sums.came))
                found[number] = self._extract(*own)
        return found

    def _extract(self, similarity: Map, best: np.ndarray, came: np.ndarray) -> Boxes:
        """Takes paths from the best end on, each away with the rectangle around it."""
        best = np.ascontiguousarray(best)
        found: list[list[int]] = []
        for _ in range(MOST_PATHS):
            i, j = divmod(int(np.argmax(best)), best.shape[1])
            if best[i, j] == -np.inf:
                break
            points = [(i, j)]
            while came[i, j] >= 0:
                down, right = paths.STEPS[came[i, j]]
                i, j = i - down, j - right
                if best[i, j] == -np.inf:  # taken by an earlier path
                    break
                points.append((i, j))
            path = np.array(points[::-1], np.int64)
            (q0, r0), (q1, r1) = path[0], path[-1]
            best[q0 : q1 + 1, r0 : r1 + 1] = -np.inf
            found += paths.segments_of(
                path,
                similarity,
                longest=self.diagonal_thres,
                at_least=self.ave_sim,
                min_length=self.min_length,
            )
        return paths.boxes(found)


def accumulate(stack: np.ndarray, *, min_sim: float, discontinue: int) -> Sums:
    """Sums of similarity + 1 along the best paths.

    A diagonal step gains the cell's similarity + 1, the others half of it; the first of equal
    predecessors is taken, in the order diagonal, above, left. In float32 maps the diagonal sum is
    float32 and the others float64 until one is stored: that is how the published code rounds.

    Args:
        stack: similarity + 1 [maps, rows, columns >= 2]; -inf where there is no cell.
        min_sim: a lower value is a dissimilar step.
        discontinue: more such steps in a row start the path anew.
    """
    count, n, m = stack.shape
    flat_values = stack.reshape(count, -1)
    best, came = flat_values.copy(), np.full((count, n * m), -1, np.int8)
    unmatched = np.zeros((count, n * m), np.int32)
    # Paths start in the first row and column: those cells stay as they are.
    for rows, flat in paths.sweeps(n, m):
        first = flat.start + flat.step * (rows.start == 0)
        stop = flat.stop - flat.step * ((flat.stop - 1) % m == 0)
        if first >= stop:
            continue
        cells = slice(first, stop, flat.step)
        value = flat_values[:, cells]
        back = [slice(cells.start - k, cells.stop - k, cells.step) for k in (m + 1, m, 1)]
        half = 0.5 * value.astype(np.float64)
        sums = np.stack(
            [best[:, back[0]] + value, best[:, back[1]] + half, best[:, back[2]] + half]
        )
        step = np.argmax(sums, axis=0)
        misses = np.stack([unmatched[:, b] for b in back])
        missed = np.take_along_axis(misses, step[None], axis=0)[0] + 1
        missed = np.where(value.astype(np.float64) < min_sim, missed, 0)
        goes_on = missed <= discontinue
        taken = np.take_along_axis(sums, step[None], axis=0)[0]
        unmatched[:, cells] = missed
        best[:, cells] = np.where(goes_on, taken, value)
        came[:, cells] = np.where(goes_on, step, -1)
    return Sums(*(x.reshape(stack.shape) for x in (best, unmatched, came)))
