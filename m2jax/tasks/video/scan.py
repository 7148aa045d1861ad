# SPDX-License-Identifier: Apache-2.0
"""Frame features searched without a database: each query is compared with all that are stored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from m2jax.config import UserError
from m2jax.tasks import neighbours
from m2jax.tasks.video import arrays
from m2jax.tasks.video.vectors import Hits

KIND = "scan"


class Scan:
    """The features of a library as they lie in its folder; exact, and nothing is stored twice.

    All of them are held in memory in float32 from the first search on: a million frames of 256
    numbers are 1 GB. Products are the device's, tile by tile.

    Args:
        files: of the videos' features, unit rows, in the library's order.
        lengths: frames that each of them holds.
    """

    def __init__(self, files: Sequence[Path], lengths: Sequence[int]) -> None:
        self._files = files
        self._starts = np.cumsum([0, *lengths])  # first row of each video, and of what is behind
        self._rows = np.zeros((0, 0), np.float32)

    def search(
        self,
        features: Float32[np.ndarray, "frames dim"],
        limit: int,
        kind: str = KIND,
        without: int = -1,
    ) -> Hits:
        """The stored frames nearest to each feature, as ``Vectors.search`` gives them.

        Args:
            features: unit rows.
            limit: frames for each.
            kind: as of ``Vectors``.
            without: number of a video that is left out; -1: none.

        Raises:
            UserError: a file of features is missing, damaged, or of another width.
        """
        if not len(self._rows):
            self._load()
        if features.shape[1] != self._rows.shape[1]:
            raise UserError(
                f"{self._files[0].parent}: features of {self._rows.shape[1]} numbers, the query's "
                f"have {features.shape[1]}: search with the model that they were made with"
            )
        shape = len(features), limit
        found = Hits(np.full(shape, -1), np.full(shape, -1), np.zeros(shape, np.float32))
        ids = self._nearest(features, limit, without)
        here = slice(None), slice(ids.shape[1])
        found.video[here] = np.searchsorted(self._starts, ids, side="right") - 1
        found.frame[here] = ids - self._starts[found.video[here]]
        for row, feature in enumerate(features):
            found.score[row, here[1]] = self._rows[ids[row]] @ feature
        return found

    def _nearest(self, features: np.ndarray, limit: int, without: int) -> np.ndarray:
        """Rows nearest to each feature, on either side of those of a video that is left out."""
        parts = [slice(0, len(self._rows))]
        if without >= 0:
            first, end = self._starts[without : without + 2].tolist()
            parts = [slice(0, first), slice(end, len(self._rows))]
        found = [  # rows are unit: the nearest are those of the highest cosine
            (own.start, neighbours.nearest(features, self._rows[own], limit))
            for own in parts
            if own.start < own.stop
        ]
        if not found:
            return np.zeros((len(features), 0), np.int64)
        ids = np.concatenate([start + near.ids for start, near in found], axis=1)
        apart = np.concatenate([near.distances for _, near in found], axis=1)
        order = np.argsort(apart, axis=1, kind="stable")[:, :limit]
        return np.take_along_axis(ids, order, axis=1)

    def close(self) -> None:
        """Lets go of the memory."""
        self._rows = np.zeros((0, 0), np.float32)

    def _load(self) -> None:
        for number, path in enumerate(self._files):
            own = arrays.read_array(path, "features")
            first, end = self._starts[number : number + 2].tolist()
            if not number:
                self._rows = np.empty((self._starts[-1], own.shape[1]), np.float32)
            if own.shape != (end - first, self._rows.shape[1]):
                raise UserError(
                    f"{path}: {own.shape[0]:,} frames of {own.shape[1]} numbers, not "
                    f"{end - first:,} of {self._rows.shape[1]}: index the videos anew"
                )
            self._rows[first:end] = own
