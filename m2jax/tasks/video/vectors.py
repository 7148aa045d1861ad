# SPDX-License-Identifier: Apache-2.0
"""Frame features in Milvus: an embedded file (milvus-lite), or a cluster by its address."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int64

from m2jax.config import UserError

MISSING = 'video: needs Milvus: pip install "m2jax[video]"'
FRAMES = 2**24  # of one video at most: a frame's key is video * FRAMES + frame
BATCH_BYTES = 8 * 2**20  # of one insertion
QUERIES = 1024  # frames of one search; milvus-lite goes through all stored keys for each

# Inner product of unit rows: the cosine. HNSW's settings are Milvus' usual ones.
KINDS = {
    "exact": ("FLAT", {}, {}),
    "hnsw": ("HNSW", {"M": 16, "efConstruction": 200}, {"ef": 128}),
}


class Hits(NamedTuple):
    """The stored frames nearest to each of some frames; -1 where there are fewer."""

    video: Int64[np.ndarray, "frames limit"]
    frame: Int64[np.ndarray, "frames limit"]
    score: Float32[np.ndarray, "frames limit"]


class Vectors:
    """A collection of frame features.

    Args:
        uri: a file of milvus-lite, or the address of a cluster (``http://HOST:19530``).
        name: of the collection.
        token: of a cluster that asks for one.

    Raises:
        UserError: pymilvus is not installed, or nothing answers there.
    """

    def __init__(self, uri: str, name: str = "frames", token: str = "") -> None:
        try:
            import pymilvus
        except ImportError:
            raise UserError(MISSING) from None
        # milvus-lite lacks a call that pymilvus tries first; gRPC prints a traceback of it.
        logging.getLogger("grpc._server").setLevel(logging.CRITICAL)
        self._pymilvus = pymilvus
        self.name = name
        self.uri = uri
        try:
            self._client = pymilvus.MilvusClient(uri, token=token)
        except Exception as error:  # gRPC, file locks, damaged files: each its own kind
            raise UserError(
                f"index {uri}: cannot be opened ({_reason(error)})"
                ": check the address, and that no other process holds it"
            ) from error

    def create(self, dim: int, kind: str) -> None:
        """Makes the collection where it is not there.

        Args:
            dim: numbers of a feature.
            kind: ``exact`` or ``hnsw``.
        """
        if self._client.has_collection(self.name):
            return
        types = self._pymilvus.DataType
        schema = self._pymilvus.MilvusClient.create_schema(auto_id=False)
        schema.add_field("key", types.INT64, is_primary=True)
        schema.add_field("feature", types.FLOAT_VECTOR, dim=dim)
        index = self._client.prepare_index_params()
        name, build, _ = KINDS[kind]
        index.add_index("feature", index_type=name, metric_type="IP", params=build)
        self._client.create_collection(self.name, schema=schema, index_params=index)

    def insert(self, video: int, features: Float32[np.ndarray, "frames dim"]) -> None:
        """Stores the features of a video; those of an earlier try are written over."""
        size = max(1, BATCH_BYTES // max(1, features[0].nbytes))
        for first in range(0, len(features), size):
            rows = [
                {"key": video * FRAMES + first + row, "feature": feature}
                for row, feature in enumerate(features[first : first + size])
            ]
            self._client.upsert(self.name, rows)

    def flush(self) -> None:
        """Puts on disk what was inserted."""
        self._client.flush(self.name)

    def search(self, features: Float32[np.ndarray, "frames dim"], limit: int, kind: str) -> Hits:
        """The stored frames nearest to each feature."""
        shape = len(features), limit
        found = Hits(np.full(shape, -1), np.full(shape, -1), np.zeros(shape, np.float32))
        self._client.load_collection(self.name)
        for first in range(0, len(features), QUERIES):
            answers = self._client.search(
                self.name,
                data=list(features[first : first + QUERIES]),
                anns_field="feature",
                limit=limit,
                search_params={"metric_type": "IP", "params": KINDS[kind][2]},
            )
            for row, hits in enumerate(answers, first):
                for place, hit in enumerate(hits):
                    found.video[row, place], found.frame[row, place] = divmod(hit["key"], FRAMES)
                    found.score[row, place] = hit["distance"]
        return found

    def close(self) -> None:
        """Lets go of the file or the connection."""
        self._client.close()


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


def _reason(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:160]
