# SPDX-License-Identifier: Apache-2.0
"""Readers of data sets by name. A new one is a function from ``Place`` and one line here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from m2jax.config import UserError
from m2jax.eval.sets import annotated, folders, lines, shards, tfds, vqa
from m2jax.eval.sets.records import DataSet, Place

READERS: dict[str, Callable[[Place], DataSet]] = {
    "coco-count": annotated.coco_count,
    "coco-objects": annotated.coco_objects,
    "cub": folders.cub,
    "cars": folders.cars,
    "dogs": folders.dogs,
    "folder": folders.read,
    "jsonl": lines.read,
    "shards": shards.read,
    "tfds": tfds.read,
    "vg-interaction": annotated.vg_interaction,
    "vg-position": annotated.vg_position,
    "vqa": vqa.read,
}


def guess(path: Path) -> str:
    """The reader of a path that names none."""
    if path.suffix == ".jsonl":
        return "jsonl"
    if path.suffix == ".tar" or shards.is_benchmark(path):
        return "shards"
    if (path / "dataset_info.json").is_file():
        return "tfds"
    if (path / "train_test_split.txt").is_file():
        return "cub"
    return "folder"


def read(place: Place, reader: str = "") -> DataSet:
    """The data set at a place.

    Args:
        place: where; ``READER:PATH`` there names its reader.
        reader: the one of the suite; empty: what the path says or looks like.

    Raises:
        UserError: no such reader, or the data set cannot be read.
    """
    named, colon, rest = str(place.path).partition(":")
    if colon and named in READERS:
        reader, place = named, place._replace(path=Path(rest))
    if str(place.path) in ("", "."):
        raise UserError("--data: names no data set: write [READER:]PATH")
    place = place._replace(path=place.path.expanduser())
    return READERS[reader or guess(place.path)](place)
