# SPDX-License-Identifier: Apache-2.0
"""A collection in Milvus, embedded or on a server, as frames of videos and items share it."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
from jaxtyping import Float32

from m2jax.config import UserError

MISSING = 'needs Milvus: pip install "m2jax[vectors]"'
BATCH_BYTES = 8 * 2**20  # of one write
QUERIES = 1024  # of one search; milvus-lite goes through all stored keys for each
# What building and searching an index are told; HNSW's numbers are Milvus' usual ones.
INDEXES: Mapping[str, tuple[Mapping[str, int], Mapping[str, int]]] = {
    "FLAT": ({}, {}),
    "HNSW": ({"M": 16, "efConstruction": 200}, {"ef": 128}),
    "AUTOINDEX": ({}, {}),
}
# A server on a busy machine may be silent for long. pymilvus gives it 10 s to take a connection and
# 5 s to answer a ping, and a failure to connect again ends a call, whatever it would have retried.
# Python's gRPC servers, milvus-lite's too, end a call that is pinged every 10 s after 2 to 4 min.
CONNECT_S = 60.0
PINGS = {"grpc.keepalive_time_ms": 320_000, "grpc.keepalive_timeout_ms": 60_000}
TRIES = 6
LONGEST_S = 16.0  # between two tries
TINY = 1e-12  # a vector that is shorter has no direction

T = TypeVar("T")


class DatabaseError(UserError):
    """What the database refused, or that it did not answer."""


class Collection:
    """A collection of one database, with vectors in ``column``; scores are inner products.

    Args:
        uri: a path that ends in .db (embedded; one process at a time), or the http:// address of a
            server or a cluster.
        name: of the collection.
        token: of a cluster that asks for one.

    Raises:
        UserError: pymilvus is missing, or the database cannot be opened.
    """

    column = "vector"

    def __init__(self, uri: str, name: str, token: str = "") -> None:
        self.uri, self.name = uri, name
        self.client = _connect(uri, token)
        self._loaded = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection; an embedded database can then be opened by another process."""
        self.client.close()
        if "://" not in self.uri:
            with contextlib.suppress(ImportError):
                from milvus_lite.server_manager import server_manager_instance

                server_manager_instance.release_server(self.uri)

    def exists(self) -> bool:
        """Whether it is there."""
        with self.named():
            return self.client.has_collection(self.name)

    def make(self, dim: int, others: Mapping[str, Mapping[str, Any]], index: str) -> None:
        """Makes it, with vectors of so many numbers and an index over them.

        Args:
            dim: numbers of a vector.
            others: columns; by name what a schema's ``add_field`` is told, types by their names.
            index: one of INDEXES; FLAT is exact.
        """
        from pymilvus import DataType

        schema = self.client.create_schema(auto_id=False, enable_dynamic_field=False)
        for name, told in others.items():
            schema.add_field(name, **{**told, "datatype": DataType[told["datatype"]]})
        schema.add_field(self.column, DataType.FLOAT_VECTOR, dim=dim)
        params, build = self.client.prepare_index_params(), dict(INDEXES[index][0])
        params.add_index(self.column, index_type=index, metric_type="IP", params=build)
        with self.named():
            self.client.create_collection(
                self.name, schema=schema, index_params=params, consistency_level="Strong"
            )

    def load(self) -> None:
        """Makes it ready to be read; a database that was closed, or crashed, opens unready."""
        if not self._loaded:
            with self.named():
                self.client.load_collection(self.name)
            self._loaded = True

    def upsert(self, rows: Sequence[Mapping[str, Any]], row_bytes: int) -> None:
        """Stores rows of some bytes each, in the place of what had their primary keys before."""
        size = max(1, BATCH_BYTES // row_bytes)
        for first in range(0, len(rows), size):
            part = [*rows[first : first + size]]
            self.patiently(lambda part=part: self.client.upsert(self.name, part))

    def nearest(
        self,
        queries: Float32[np.ndarray, "queries dim"],
        limit: int,
        index: str,
        *,
        where: str = "",
        columns: Sequence[str] = (),
    ) -> list[list[dict[str, Any]]]:
        """The rows nearest to each query, the nearest first, as pymilvus gives them."""
        self.load()
        found: list[list[dict[str, Any]]] = []
        told = {name: max(value, limit) for name, value in INDEXES[index][1].items()}  # ef >= limit
        for first in range(0, len(queries), QUERIES):
            with self.named():
                found += self.client.search(
                    self.name,
                    data=[*queries[first : first + QUERIES]],
                    limit=limit,
                    filter=where,
                    output_fields=[*columns],
                    search_params={"metric_type": "IP", "params": told},
                    consistency_level="Strong",
                )
        return found

    def patiently(self, call: Callable[[], T]) -> T:
        """What a call gives that may be made more than once; failures are waited out, TRIES times.

        Raises:
            DatabaseError: the last one.
        """
        for tried in range(1, TRIES):
            try:
                with self.named():
                    return call()
            except DatabaseError as error:
                wait = min(2.0 ** (tried - 1), LONGEST_S)
                print(f"{error}: try {tried + 1} of {TRIES} in {wait:.0f} s", file=sys.stderr)
            time.sleep(wait)
            self._loaded = False  # the server may have been started again
            with contextlib.suppress(DatabaseError):
                self.load()
        with self.named():
            return call()

    @contextlib.contextmanager
    def named(self) -> Iterator[None]:
        """The database's own errors, in one line.

        Raises:
            DatabaseError: instead of them.
        """
        import grpc
        from pymilvus.exceptions import MilvusException

        try:
            yield
        except (MilvusException, grpc.RpcError) as error:
            said = str(getattr(error, "message", "") or error).strip() or type(error).__name__
            raise DatabaseError(
                f"{self.uri}: {self.name}: {said.splitlines()[0][:200]}: see whether the database "
                "runs"
            ) from error


def _connect(uri: str, token: str) -> Any:
    try:
        from pymilvus import MilvusClient
    except ImportError as error:
        raise UserError(MISSING) from error
    # All three raise what they log with tracebacks, or it is of no interest.
    for name in ("pymilvus", "milvus_lite", "grpc._server"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    embedded = "://" not in uri
    if embedded and (not uri.endswith(".db") or not Path(uri).absolute().parent.is_dir()):
        raise UserError(
            f"database {uri}: name one that ends in .db in a folder that is there, or an http:// "
            "address"
        )
    try:
        return MilvusClient(uri, token=token, timeout=CONNECT_S, grpc_options=PINGS)
    except Exception as error:  # gRPC, file locks, damaged files: each its own kind
        why = "cannot be reached: start it or mend the address"
        if embedded:
            why = (
                "another process has it open, or it is no database: close that, or share it by "
                "`milvus-lite server` and its http:// address"
            )
        raise UserError(f"database {uri}: {why}") from error


def unit(x: np.ndarray) -> Float32[np.ndarray, "n dim"]:
    """Rows of unit length."""
    x = np.asarray(x, np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), TINY)
