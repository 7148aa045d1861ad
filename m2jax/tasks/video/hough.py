# SPDX-License-Identifier: Apache-2.0
"""Temporal Hough voting: frames vote for the offset between the videos.

As VCSL's benchmark has it (He et al., CVPR 2022; after Douze et al., ECCV 2010): every offset with
a similar enough cell gives the whole diagonal as a box, untrimmed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from m2jax.tasks.video.maps import Boxes, Map, overlap


@dataclass(frozen=True, kw_only=True)
class HoughVoting:
    """HV with VCSL's settings."""

    min_sim: float = 0.2  # cells below count as 0
    iou_thresh: float = 0.9  # boxes that overlap a better one by more are dropped
    max_peaks: int = 100  # offsets looked at

    def __call__(self, maps: Sequence[Map]) -> list[Boxes]:
        """Segments of each map, best first; ends inclusive."""
        return [self._one(similarity) for similarity in maps]

    def _one(self, similarity: Map) -> Boxes:
        n, m = similarity.shape
        votes = np.where(similarity < self.min_sim, similarity.dtype.type(0), similarity)
        # Rows reversed and skewed, so that each diagonal of the map becomes a column.
        scores = _columns(votes[::-1]).sum(axis=0, dtype=np.float64)
        hit = _columns(votes[::-1] >= self.min_sim).any(axis=0)
        offsets = np.flatnonzero(hit) - (n - 1)
        scores = scores[hit]
        best = np.argsort(-scores, kind="stable")[: self.max_peaks]
        start = np.maximum(0, -offsets[best])
        length = np.minimum(n, m - offsets[best]) - start
        q, r = start, start + offsets[best]
        candidates = np.stack([q, r, q + length - 1, r + length - 1], axis=1).astype(np.int64)
        kept = np.zeros((0, 4), np.int64)
        for box, score in zip(candidates, scores[best], strict=True):
            if score > 0 and not (overlap(box, kept) > self.iou_thresh).any():
                kept = np.concatenate([kept, box[None]])
        return kept


def _columns(rows: np.ndarray) -> np.ndarray:
    """Row i moved i places to the right, with zeros around: [n, m] to [n, n + m - 1]."""
    n, m = rows.shape
    wide = np.zeros((n, n + m), rows.dtype)
    wide[:, :m] = rows
    return wide.reshape(-1)[: n * (n + m - 1)].reshape(n, n + m - 1)
