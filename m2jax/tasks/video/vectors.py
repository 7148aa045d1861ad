# SPDX-License-Identifier: Apache-2.0
"""Frame features in Milvus."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int64

from m2jax.tasks.vectors import Collection

FRAMES = 2**24  # of one video at most
KINDS = {"exact": "FLAT", "hnsw": "HNSW"}  # names of indexes, and Milvus' own


class Hits(NamedTuple):
    """The stored frames nearest to each of some frames; -1 where there are fewer."""

    video: Int64[np.ndarray, "frames limit"]
    frame: Int64[np.ndarray, "frames limit"]
    score: Float32[np.ndarray, "frames limit"]


class Vectors(Collection):
    """Frame features, as unit rows; a frame's key is video * FRAMES + frame."""

    column = "feature"

    def __init__(self, uri: str, name: str = "frames", token: str = "") -> None:
        super().__init__(uri, name, token)

    def create(self, dim: int, kind: str) -> None:
        """Makes the collection where it is not there, for so many numbers, of one of KINDS."""
        if not self.exists():
            self.make(dim, {"key": {"datatype": "INT64", "is_primary": True}}, KINDS[kind])

    def insert(self, video: int, features: Float32[np.ndarray, "frames dim"]) -> None:
        """Stores the features of a video; those of an earlier try are written over."""
        rows = [{"key": key, "feature": row} for key, row in enumerate(features, video * FRAMES)]
        self.upsert(rows, features[0].nbytes)

    def flush(self) -> None:
        """Puts on disk what was inserted."""
        self.patiently(lambda: self.client.flush(self.name))

    def search(
        self, features: Float32[np.ndarray, "frames dim"], limit: int, kind: str, without: int = -1
    ) -> Hits:
        """The stored frames nearest to each feature, those of a video (its number) left out."""
        outside = f"key < {without * FRAMES} or key >= {(without + 1) * FRAMES}"
        shape = len(features), limit
        found = Hits(np.full(shape, -1), np.full(shape, -1), np.zeros(shape, np.float32))
        rows = self.nearest(features, limit, KINDS[kind], where=outside if without >= 0 else "")
        for row, hits in enumerate(rows):
            for place, hit in enumerate(hits):
                found.video[row, place], found.frame[row, place] = divmod(hit["key"], FRAMES)
                found.score[row, place] = hit["distance"]
        return found


def reference_maps(
    hits: Hits, lengths: Sequence[int]
) -> dict[int, Float32[np.ndarray, "query reference"]]:
    """Sparse similarity maps of the videos that were hit: 0 where no frame was among the nearest.

    Args:
        hits: of each of the query's frames.
        lengths: frames of each stored video.
    """
    rows = np.arange(len(hits.video))[:, None]
    found = {}
    for video in np.unique(hits.video[hits.video >= 0]).tolist():
        of = hits.video == video
        own = np.zeros((len(rows), lengths[video]), np.float32)
        own[np.broadcast_to(rows, of.shape)[of], hits.frame[of]] = hits.score[of]
        found[video] = own
    return found
