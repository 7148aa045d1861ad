# SPDX-License-Identifier: Apache-2.0
"""Vectors of several model versions in one Milvus collection, one vector per item at any time.

An item's id is its primary key, so a write with a newer version takes the older one's place in a
single step: nothing is ever there twice or missing, however often a backfill is cut off. The tag
``version`` says which model made a vector. Vectors are of unit length, scores are cosines.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from m2jax.config import UserError

DEFAULT_URI = "milvus.db"  # an embedded database in a folder of that name
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}")  # of a collection, by Milvus's rule
VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # goes into filters: no quotes
ID_BYTES = 512
PAGE = 10_000  # items of a page; a cluster gives at most 16,384
INDEXES = ("FLAT", "HNSW", "AUTOINDEX")


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


class Store:
    """A collection of one database.

    Args:
        uri: a path that ends in .db (embedded; one process at a time), or the http:// address of a
            server or a cluster.
        collection: its name.
        token: of a cluster that asks for one.

    Raises:
        UserError: pymilvus is missing, the database cannot be reached, or a name that cannot be.
    """

    def __init__(self, uri: str = DEFAULT_URI, collection: str = "items", token: str = "") -> None:
        if not NAME.fullmatch(collection):
            raise UserError(
                f"--collection {collection!r}: use letters, digits and _, not a digit first"
            )
        self.uri, self.collection = uri, collection
        self._client = _connect(uri, token)
        self._dim = 0
        if self.exists():
            with self._named():  # a database that was closed, or crashed, opens with nothing loaded
                self._client.load_collection(collection)

    def close(self) -> None:
        """Ends the connection; an embedded database can then be opened by another process."""
        self._client.close()
        if self.uri.endswith(".db"):
            with contextlib.suppress(ImportError):
                from milvus_lite.server_manager import server_manager_instance

                server_manager_instance.release_server(self.uri)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def create(self, dim: int, *, index: str = "FLAT") -> None:
        """Makes the collection if it is not there.

        Args:
            dim: of the vectors.
            index: FLAT (exact) | HNSW | AUTOINDEX.

        Raises:
            UserError: it is there with another dimension, or an unknown index.
        """
        if index not in INDEXES:
            raise UserError(f"--index {index}: unknown: use one of {', '.join(INDEXES)}")
        if self.exists():
            if self.dim != dim:
                raise UserError(
                    f"{self.collection}: holds vectors of {self.dim} numbers, these have {dim}: "
                    "models of one collection must agree; use another --collection"
                )
            return
        from pymilvus import DataType, MilvusClient

        schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=ID_BYTES)
        schema.add_field("version", DataType.VARCHAR, max_length=64)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=dim)
        params = MilvusClient.prepare_index_params()
        params.add_index("vector", index_type=index, metric_type="IP")
        with self._named():
            self._client.create_collection(
                self.collection, schema=schema, index_params=params, consistency_level="Strong"
            )

    def exists(self) -> bool:
        """Whether the collection is there."""
        with self._named():
            return self._client.has_collection(self.collection)

    @property
    def dim(self) -> int:
        """Numbers of a vector.

        Raises:
            UserError: no such collection.
        """
        if self._dim:
            return self._dim
        if not self.exists():
            raise UserError(
                f"{self.collection}: no such collection in {self.uri}: m2jax retrieval index "
                "makes it"
            )
        with self._named():
            fields = self._client.describe_collection(self.collection)["fields"]
        vectors = [f for f in fields if f["name"] == "vector"]
        if not vectors or {f["name"] for f in fields} != {"id", "version", "vector"}:
            raise UserError(f"{self.collection}: was not made by m2jax: use another --collection")
        self._dim = int(vectors[0]["params"]["dim"])
        return self._dim

    def write(
        self, ids: Sequence[str], vectors: Float32[np.ndarray, "n dim"], version: str
    ) -> None:
        """Stores items, each in the place of what had its id before."""
        rows = [
            {"id": name, "version": version, "vector": vector}
            for name, vector in zip(ids, vectors, strict=True)
        ]
        with self._named():
            self._client.upsert(self.collection, rows)

    def read(self, ids: Sequence[str]) -> dict[str, Row]:
        """Those of the named items that are there."""
        with self._named():
            rows = self._client.get(
                self.collection, ids=list(ids), output_fields=["id", "version", "vector"]
            )
        return {row["id"]: _row(row) for row in rows}

    def rows(self, *, batch: int = PAGE) -> Iterator[Row]:
        """Every stored item; the embedded database goes through all of them for each page."""
        with self._named():
            pages = self._client.query_iterator(
                self.collection,
                batch_size=batch,
                output_fields=["id", "version", "vector"],
                consistency_level="Strong",
            )
            while page := pages.next():
                yield from map(_row, page)
            pages.close()

    def count(self, version: str = "") -> int:
        """Items, or those of one version."""
        where = f'version == "{checked_version(version)}"' if version else ""
        with self._named():
            found = self._client.query(
                self.collection,
                filter=where,
                output_fields=["count(*)"],
                consistency_level="Strong",
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
                f"{self.collection}: holds vectors of {self.dim} numbers, queries have "
                f"{queries.shape[1]}: embed them with a model of this collection"
            )
        names = ", ".join(f'"{checked_version(version)}"' for version in versions)
        with self._named():
            answers = self._client.search(
                self.collection,
                data=[*unit(queries)],
                limit=k,
                filter=f"version in [{names}]" if versions else "",
                output_fields=["version"],
                consistency_level="Strong",
            )
        return [
            [Found(hit["id"], float(hit["distance"]), hit["entity"]["version"]) for hit in answer]
            for answer in answers
        ]

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """The database's own errors, in one line."""
        from pymilvus.exceptions import MilvusException

        try:
            yield
        except MilvusException as error:
            said = str(error.message).strip().splitlines() or [type(error).__name__]
            raise UserError(
                f"{self.uri}: {self.collection}: {said[0]}: see whether the database runs"
            ) from error


def _connect(uri: str, token: str) -> Any:
    try:
        from pymilvus import MilvusClient
        from pymilvus.exceptions import MilvusException
    except ModuleNotFoundError as error:
        raise UserError("m2jax retrieval: needs pymilvus: pip install 'm2jax[vectors]'") from error
    embedded = "://" not in uri
    if embedded and (not uri.endswith(".db") or not Path(uri).absolute().parent.is_dir()):
        raise UserError(
            f"--uri {uri}: name a database that ends in .db in a folder that is there, or an "
            "http:// address"
        )
    # An embedded database that is in use is logged with a traceback before it is refused.
    noisy = [logging.getLogger(name) for name in ("milvus_lite", "pymilvus")]
    levels = [each.level for each in noisy]
    for each in noisy:
        each.setLevel(logging.CRITICAL)
    try:
        return MilvusClient(uri, token=token)
    except (MilvusException, OSError, ValueError) as error:
        why = (
            "another process has it open, or it is no database: close that, or share it by "
            "`milvus-lite server` and its http:// address"
            if embedded
            else "cannot be reached: start it or mend the address"
        )
        raise UserError(f"--uri {uri}: {why}") from error
    finally:
        for each, level in zip(noisy, levels, strict=True):
            each.setLevel(level)


def _row(found: dict[str, Any]) -> Row:
    return Row(found["id"], found["version"], np.asarray(found["vector"], np.float32))


def unit(x: np.ndarray) -> Float32[np.ndarray, "n dim"]:
    """Rows of unit length."""
    x = np.asarray(x, np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


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
