# SPDX-License-Identifier: Apache-2.0
"""Tables of images with metadata, in the layout of SnakeCLEF 2022's CSV files, and their codes.

Columns: ``file_path``, ``observation_id``, ``country``, ``code``, ``endemic``, and for training
``class_id`` or ``binomial_name``. Letters' case and underscores in the names do not count, as the
release writes them in two ways. Empty metadata is allowed and counted; an image without an
observation id is not.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from m2jax.config import UserError
from m2jax.eval.sets import records
from m2jax.tasks.longtail.postprocess import UNKNOWN

FILE_BYTES = 2**30
TRUTH = {"true": "1", "1": "1", "yes": "1", "false": "0", "0": "0", "no": "0", "": ""}
FIELDS = ("code", "country", "endemic")
_ASIDE = ("classid", "binomialname")


@dataclass(frozen=True)
class Row:
    """One image."""

    file: Path
    observation: str
    side: Mapping[str, str]  # by field; "" where the table says nothing
    label: str = ""  # class, "" where it is not told


def read(path: Path, images: Path | None = None, *, labelled: bool) -> list[Row]:
    """The rows of a table.

    Args:
        path: a CSV file, UTF-8.
        images: the folder its paths start from; the table's own if not given.
        labelled: whether every row must have a class.

    Raises:
        UserError: no such file, a column or a value is missing; the message names the line.
    """
    try:
        if path.stat().st_size > FILE_BYTES:
            raise UserError(f"--table {path}: over {FILE_BYTES:,} bytes: name the right file")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"--table {path}: {error.strerror}: check the path") from None
    except UnicodeDecodeError:
        raise UserError(f"--table {path}: not UTF-8: save it in that encoding") from None
    reader = csv.reader(io.StringIO(text))
    try:
        header = _header(next(reader, []), path)
        cells = [
            (_whole(values, header, path, reader.line_num), reader.line_num)
            for values in reader
            if values
        ]
    except csv.Error as error:
        raise UserError(f"--table {path}: no CSV ({error}): save it as one") from error
    if not cells:
        raise UserError(f"--table {path}: holds no image: add rows")
    # One column for the whole table: a species by number here and by name there would be two.
    column = next((name for name in _ASIDE if any(row.get(name) for row, _ in cells)), "")
    found = []
    for row, line in cells:
        found.append(_row(row, column, images or path.parent, f"--table {path}: line {line}"))
        if labelled and not found[-1].label:
            raise UserError(f"--table {path}: line {line}: has no class: fill in class_id")
    return found


@dataclass(frozen=True)
class Codes:
    """What the training table holds: classes, and the values of each field."""

    classes: tuple[str, ...]
    values: Mapping[str, tuple[str, ...]]

    @property
    def width(self) -> int:
        """Numbers of side information per image."""
        return sum(map(len, self.values.values()))

    def labels(self, rows: Sequence[Row]) -> Int[np.ndarray, " images"]:
        """Class numbers.

        Raises:
            UserError: a class that training does not have.
        """
        place = {name: n for n, name in enumerate(self.classes)}
        for row in rows:
            if row.label not in place:
                raise UserError(
                    f"--table: class {row.label!r} of {row.file.name}: unknown: train it, or take "
                    "the column of classes out"
                )
        return np.array([place[row.label] for row in rows], np.int64)

    def places(self, rows: Sequence[Row], field: str = "code") -> Int[np.ndarray, " images"]:
        """Numbers of a field's values; ``UNKNOWN`` where training never had it or it is empty."""
        place = {value: n for n, value in enumerate(self.values[field])}
        return np.array([place.get(row.side[field], UNKNOWN) for row in rows], np.int64)

    def side(self, rows: Sequence[Row]) -> Float[np.ndarray, "images width"]:
        """One-hot vectors of all fields beside each other; zeros for what is not known."""
        parts = []
        for field, values in self.values.items():
            places = self.places(rows, field)
            parts.append((places[:, None] == np.arange(len(values))).astype(np.float32))
        return np.concatenate(parts, axis=1)

    def unknown(self, rows: Sequence[Row]) -> dict[str, dict[str, int]]:
        """How often a field is empty, and how often it has a value that training never had."""
        found = {}
        for field, values in self.values.items():
            given = [row.side[field] for row in rows]
            found[field] = {
                "missing": given.count(""),
                "unknown": sum(value != "" and value not in values for value in given),
            }
        return found


def codes(rows: Sequence[Row]) -> Codes:
    """Classes and values of a training table, in order of name.

    Raises:
        UserError: it has one class alone.
    """
    classes = tuple(sorted({row.label for row in rows}, key=_natural))
    if len(classes) < 2:
        raise UserError("--table: has one class alone: give at least two")
    values = {field: tuple(sorted({row.side[field] for row in rows} - {""})) for field in FIELDS}
    return Codes(classes, values)


def _row(cells: Mapping[str, str], column: str, images: Path, where: str) -> Row:
    observation = cells["observationid"]
    if not observation:
        raise UserError(f"{where}: has no observation id: give the image one of its own")
    endemic = cells.get("endemic", "").lower()
    if endemic not in TRUTH:
        raise UserError(f"{where}: endemic is {endemic[:20]!r}: write true or false, or nothing")
    side = {field: cells.get(field, "") for field in ("code", "country")}
    file = records.inside(images, cells["filepath"], where)
    return Row(file, observation, side | {"endemic": TRUTH[endemic]}, cells.get(column, ""))


def _header(names: Sequence[str], path: Path) -> list[str]:
    """The columns' names; refuses a table without those that it must have, and one name twice."""
    found = [_key(name) for name in names]
    for name in ("file_path", "observation_id"):
        if _key(name) not in found:
            raise UserError(f"--table {path}: has no column {name}: add it")
    for name, key in zip(names, found, strict=True):
        if found.count(key) > 1:
            raise UserError(f"--table {path}: two columns are called {name.strip()!r}: remove one")
    return found


def _whole(values: Sequence[str], header: Sequence[str], path: Path, line: int) -> dict[str, str]:
    """The cells of a row by column."""
    if len(values) != len(header):
        raise UserError(
            f"--table {path}: line {line}: {len(values)} cells under {len(header)} columns: mend it"
        )
    return dict(zip(header, map(str.strip, values), strict=True))


def _key(name: str) -> str:
    return name.strip().lower().replace("_", "").replace(" ", "")


def _natural(name: str) -> tuple[int, str]:
    """Numbers by value, before words."""
    return (int(name), "") if name.isdecimal() and len(name) < 18 else (10**18, name)
