# SPDX-License-Identifier: Apache-2.0
"""Readers of data sets by name. A new one is a function from ``Place`` and one line here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from m2jax.config import UserError
from m2jax.eval.sets import annotated, folders, lines, many_labels, shards, tfds, vqa
from m2jax.eval.sets.records import DataSet, Place

READERS: dict[str, Callable[[Place], DataSet]] = {
    "coco-count": annotated.coco_count,
    "coco-objects": annotated.coco_objects,
    "cub": folders.cub,
    "cars": folders.cars,
    "dogs": folders.dogs,
    "folder": folders.read,
    "jsonl": lines.read,
    "nus-wide": many_labels.nus_wide,
    "shards": shards.read,
    "tfds": tfds.read,
    "vg-interaction": annotated.vg_interaction,
    "vg-position": annotated.vg_position,
    "voc2007": many_labels.voc,
    "vqa": vqa.read,
}

SPLIT = "{split}"  # in a path


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
        place: where; ``READER:PATH`` there names its reader, and ``{split}`` stands for the split.
        reader: the one of the suite; empty: what the path says or looks like.

    Raises:
        UserError: no such reader, the data set cannot be read, or it keeps no splits apart although
            one was asked for.
    """
    if place.asked and not has_split(place, reader):
        raise UserError(
            f"--split {place.split}: {place.path} has no such split: leave the flag out, or write "
            "{split} where its name goes in the path"
        )
    place, reader = _found(place, reader)
    return READERS[reader](place)


def has_split(place: Place, reader: str = "") -> bool:
    """Whether the split of a place chooses what is read there, or is all that there is.

    Args:
        place: as for ``read``.
        reader: as for ``read``.

    Raises:
        UserError: it names no data set.
    """
    if SPLIT in str(place.path):
        return True
    place, reader = _found(place, reader)
    if reader in ("cub", "dogs", "cars"):
        return place.split in ("train", "test")
    if reader == "folder":
        return (place.path / place.split).is_dir()
    return reader != "jsonl" and (reader != "shards" or place.path.is_dir())


def _found(place: Place, reader: str) -> tuple[Place, str]:
    """A place with its path as it is opened, and its reader."""
    named, colon, rest = str(place.path).partition(":")
    if colon and named in READERS:
        reader, place = named, place._replace(path=Path(rest))
    if str(place.path) in ("", "."):
        raise UserError("--data: names no data set: write [READER:]PATH")
    path = Path(str(place.path).replace(SPLIT, place.split)).expanduser()
    return place._replace(path=path), reader or guess(path)
