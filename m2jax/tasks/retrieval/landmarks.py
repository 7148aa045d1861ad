# SPDX-License-Identifier: Apache-2.0
"""Landmark sets in their published layouts: revisited Oxford and Paris, Google Landmarks v2.

ROxford and RParis: ``gnd_roxford5k.pkl`` (or ``gnd_rparis6k.pkl``), a pickle, beside ``jpg/``. A
pickle can run code: it is read by a reader that knows plain containers, numbers, strings and NumPy
arrays and refuses all else. GLDv2: ``train_clean.csv`` (landmark_id,images),
``retrieval_solution_v2.1.csv`` (id,images,Usage) and images at a/b/c/abc....jpg.
"""

from __future__ import annotations

import csv
import io
import pickle
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from m2jax.config import UserError
from m2jax.tasks.retrieval.metrics import Truth

IMAGE_ID = re.compile(r"[0-9a-f]{16}")
# What a pickled ground truth may be made of; everything else is refused.
_ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("_codecs", "encode"),
}


class Revisited(NamedTuple):
    """Queries and gallery of revisited Oxford or Paris."""

    queries: list[Path]
    gallery: list[Path]
    boxes: list[tuple[float, float, float, float]]  # left, top, right, bottom of each query
    truth: Truth


class Landmarks(NamedTuple):
    """Images of a labelled training set."""

    files: list[Path]
    labels: Int[np.ndarray, " images"]  # from 0 without gaps
    landmarks: list[str]  # the data set's id of each label


class Solution(NamedTuple):
    """Right gallery images of each query, by their ids."""

    queries: list[str]
    right: list[list[str]]


class _Plain(pickle.Unpickler):
    """Reads data, never code."""

    def find_class(self, module: str, name: str) -> Any:
        """Only what arrays are made of."""
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no data")
        return super().find_class(module, name)


def revisited(file: Path) -> Revisited:
    """ROxford or RParis, from its ``gnd_*.pkl``, beside which ``jpg/`` lies.

    Raises:
        UserError: no ground truth there, or none that can be.
    """
    try:
        made = _Plain(io.BytesIO(file.read_bytes())).load()
        names, queries, rows = made["imlist"], made["qimlist"], made["gnd"]
        parts = {kind: [_rows(row[kind], len(names)) for row in rows] for kind in Truth._fields}
        boxes = [_box(row["bbx"]) for row in rows]
    except (OSError, KeyError, TypeError, ValueError, pickle.UnpicklingError, EOFError) as error:
        raise UserError(f"{file}: no ground truth ({error}): download it again") from error
    if len(queries) != len(rows):
        raise UserError(f"{file}: {len(queries)} queries, {len(rows)} truths: download it again")
    files = [[_jpg(file.parent, name, file) for name in each] for each in (queries, names)]
    return Revisited(files[0], files[1], boxes, Truth(*(parts[kind] for kind in Truth._fields)))


def _box(values: Any) -> tuple[float, float, float, float]:
    left, top, right, bottom = (float(v) for v in values)
    return left, top, right, bottom


def _rows(values: Any, count: int) -> np.ndarray:
    rows = np.asarray(values, np.int64).ravel()
    if rows.size and not 0 <= rows.min() <= rows.max() < count:
        raise ValueError("it names images that the list has not")
    return rows


def _jpg(root: Path, name: Any, file: Path) -> Path:
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
        raise UserError(f"{file}: {str(name)[:40]!r} is no name of an image: download it again")
    return root / "jpg" / f"{name}.jpg"


def gldv2_file(root: Path, image: str) -> Path:
    """Where an image of Google Landmarks v2 lies."""
    return root / image[0] / image[1] / image[2] / f"{image}.jpg"


def gldv2_train(table: Path, images: Path) -> Landmarks:
    """Training images from ``train_clean.csv``.

    Raises:
        UserError: a table that is not the data set's.
    """
    files, labels, landmarks = [], [], []
    for number, row in _table(table, ("landmark_id", "images")):
        ids = row["images"].split()
        _check_ids(ids, table, number)
        files += [gldv2_file(images, name) for name in ids]
        labels += [len(landmarks)] * len(ids)
        landmarks.append(row["landmark_id"])
    if not files:
        raise UserError(f"{table}: has no row: download it again")
    return Landmarks(files, np.array(labels, np.int64), landmarks)


def gldv2_solution(table: Path, usage: str = "Private") -> Solution:
    """Right images of the queries of one part, Public or Private.

    Raises:
        UserError: a table that is not the data set's, or no query of that part.
    """
    queries, right = [], []
    for number, row in _table(table, ("id", "images", "Usage")):
        if row["Usage"] != usage or row["images"] in ("", "None"):
            continue
        ids = row["images"].split()
        _check_ids([row["id"], *ids], table, number)
        queries.append(row["id"])
        right.append(ids)
    if not queries:
        raise UserError(f"{table}: has no query of Usage {usage}: use Public or Private")
    return Solution(queries, right)


def _table(table: Path, columns: tuple[str, ...]) -> list[tuple[int, dict[str, str]]]:
    try:
        with table.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            named = set(reader.fieldnames or ())
            rows = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{table}: unreadable ({error}): download it again") from error
    if not set(columns) <= named:
        raise UserError(
            f"{table}: lacks one of the columns {', '.join(columns)}: download it again"
        )
    for number, row in rows:
        if any(row[column] is None for column in columns):
            raise UserError(f"{table}: line {number} is cut off: download it again")
    return rows


def _check_ids(ids: list[str], table: Path, number: int) -> None:
    for name in ids:
        if not IMAGE_ID.fullmatch(name):
            raise UserError(f"{table}: line {number}: {name[:40]!r} is no id of an image: mend it")
