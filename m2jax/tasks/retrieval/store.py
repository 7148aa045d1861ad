# SPDX-License-Identifier: Apache-2.0
"""Vectors of several model versions in one Milvus collection, one vector per item at any time.

An item's id is its primary key, so a write with a newer version takes the older one's place in a
single step: nothing is ever there twice or missing, however often a backfill is cut off. The tag
``version`` says which model made a vector. Vectors are of unit length, scores are cosines.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from m2jax.config import UserError
from m2jax.tasks.vectors import INDEXES, Collection, unit

DEFAULT_URI = "milvus.db"  # an embedded database in a folder of that name
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}")  # of a collection, by Milvus's rule
VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # goes into filters: no quotes
ID_BYTES = 512
PAGE = 16_000  # items of one answer; a cluster gives at most 16,384
FIELDS = ("id", "version", "vector")


class Found(NamedTuple):
    """One answer of a search."""

    id: str
    score: float  # cosine
    version: str  # of the model that made the vector


class Row(NamedTuple):
    """One stored item."""

    id: str
    version: str
    vector: Float32[np.ndarray, " dim"]


class Store(Collection):
    """Items of one collection; see there for the arguments."""

    def __init__(self, uri: str = DEFAULT_URI, collection: str = "items", token: str = "") -> None:
        if not NAME.fullmatch(collection):
            raise UserError(
                f"--collection {collection!r}: use letters, digits and _, not a digit first"
            )
        super().__init__(uri, collection, token)
        self._dim, self._index = 0, ""

    def create(self, dim: int, *, index: str = "") -> None:
        """Makes the collection if it is not there.

        Args:
            dim: of the vectors.
            index: FLAT (exact) | HNSW | AUTOINDEX; not given: the one it has, FLAT for a new one.

        Raises:
            UserError: it is there with another dimension or index, or an unknown index.
        """
        check_index(index)
        if self.exists():
            if self.dim != dim:
                raise UserError(
                    f"{self.name}: holds vectors of {self.dim} numbers, these have {dim}: "
                    "models of one collection must agree; use another --collection"
                )
            if index not in ("", self._index):
                raise UserError(
                    f"--index {index}: {self.name} has {self._index} already: leave --index out, "
                    "or use another --collection"
                )
            return
        name = {"datatype": "VARCHAR", "is_primary": True, "max_length": ID_BYTES}
        version = {"datatype": "VARCHAR", "max_length": 64}
        self.make(dim, {"id": name, "version": version}, index or "FLAT")

    @property
    def dim(self) -> int:
        """Numbers of a vector.

        Raises:
            UserError: no such collection.
        """
        if not self._dim:
            if not self.exists():
                raise UserError(
                    f"{self.name}: no such collection in {self.uri}: m2jax retrieval index makes it"
                )
            with self.named():
                fields = self.client.describe_collection(self.name)["fields"]
                there = {field["name"]: field["params"] for field in fields}
                kind = self.client.describe_index(self.name, "vector")["index_type"]
            if {*there} != {*FIELDS}:
                raise UserError(f"{self.name}: was not made by m2jax: use another --collection")
            self._dim = int(there["vector"]["dim"])
            self._index = kind if kind in INDEXES else "AUTOINDEX"
        return self._dim

    def write(
        self, ids: Sequence[str], vectors: Float32[np.ndarray, "n dim"], version: str
    ) -> None:
        """Stores items, each in the place of what had its id before."""
        rows = [
            {"id": name, "version": version, "vector": vector}
            for name, vector in zip(ids, vectors, strict=True)
        ]
        self.upsert(rows, ID_BYTES + vectors.itemsize * vectors.shape[1])

    def read(self, ids: Sequence[str]) -> dict[str, Row]:
        """Those of the named items that are there."""
        self.load()
        found: dict[str, Row] = {}
        for first in range(0, len(ids), PAGE):
            # pymilvus' own ``get`` puts ids between quotes as they are, and paths may have quotes.
            names = [json.dumps(name, ensure_ascii=False) for name in ids[first : first + PAGE]]
            where = f"id in [{', '.join(names)}]"
            rows = self.patiently(
                lambda where=where: self.client.query(
                    self.name, where, output_fields=[*FIELDS], consistency_level="Strong"
                )
            )
            found |= {row["id"]: _row(row) for row in rows}
        return found

    def rows(self, *, batch: int = PAGE) -> Iterator[Row]:
        """Every stored item; the embedded database goes through all of them for each page."""
        self.load()
        with self.named():
            pages = self.client.query_iterator(
                self.name, batch, output_fields=[*FIELDS], consistency_level="Strong"
            )
            while page := pages.next():
                yield from map(_row, page)
            pages.close()

    def count(self, version: str = "") -> int:
        """Items, or those of one version."""
        where = f'version == "{checked_version(version)}"' if version else ""
        self.load()
        with self.named():
            found = self.client.query(
                self.name, where, output_fields=["count(*)"], consistency_level="Strong"
            )
        return int(found[0]["count(*)"])

    def search(
        self,
        queries: Float32[np.ndarray, "queries dim"],
        k: int,
        versions: Sequence[str] = (),
    ) -> list[list[Found]]:
        """The ``k`` items nearest to each query, among all versions or some.

        Old and new vectors are compared by the same cosines: that is what a compatible model is
        trained for, and what ``upgrade-report`` checks.

        Raises:
            UserError: queries of another dimension, or a version that cannot be.
        """
        if queries.shape[1] != self.dim:
            raise UserError(
                f"{self.name}: holds vectors of {self.dim} numbers, queries have "
                f"{queries.shape[1]}: embed them with a model of this collection"
            )
        names = ", ".join(f'"{checked_version(version)}"' for version in versions)
        where = f"version in [{names}]" if versions else ""
        answers = self.nearest(unit(queries), k, self._index, where=where, columns=["version"])
        return [
            [Found(hit["id"], float(hit["distance"]), hit["entity"]["version"]) for hit in answer]
            for answer in answers
        ]


def _row(found: dict[str, Any]) -> Row:
    return Row(found["id"], found["version"], np.asarray(found["vector"], np.float32))


def check_index(index: str) -> None:
    """Whether there is such an index; none at all is one too.

    Raises:
        UserError: there is not.
    """
    if index and index not in INDEXES:
        raise UserError(f"--index {index}: unknown: use one of {', '.join(INDEXES)}")


def checked_version(version: str) -> str:
    """The name of a version, if it is one.

    Raises:
        UserError: it is not.
    """
    if not VERSION.fullmatch(version):
        raise UserError(
            f"version {version!r}: use up to 64 letters, digits and . _ -, a letter or digit first"
        )
    return version
