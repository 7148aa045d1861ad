# SPDX-License-Identifier: Apache-2.0
"""Readers of collections, by kind."""

from __future__ import annotations

import importlib

from m2jax.config import UserError
from m2jax.data.build import INSTALL
from m2jax.data.build.readers.base import Reader

# Kind -> module and class; a module is imported where its kind is used, for its library's sake.
KINDS = {
    "tars": ("tars", "Tars"),
    "parquet": ("parquet", "Parquet"),
    "tsv64": ("tsv64", "Tsv64"),
    "lmdb": ("lmdb_pairs", "LmdbPairs"),
    "coco": ("coco", "Coco"),
}


def reader(kind: str) -> Reader:
    """The reader of a kind of collection.

    Raises:
        UserError: an unknown kind, or its library is not installed.
    """
    if kind not in KINDS:
        raise UserError(f"--source: kind {kind!r} is unknown: use one of {', '.join(KINDS)}")
    module, name = KINDS[kind]
    try:
        return getattr(importlib.import_module(f"{__name__}.{module}"), name)()
    except ModuleNotFoundError as error:
        raise UserError(f"--source {kind}: needs {error.name}: {INSTALL}") from error
