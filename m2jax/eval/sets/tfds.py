# SPDX-License-Identifier: Apache-2.0
"""TFDS data sets: pictures with a class label, several labels, or captions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from m2jax.config import UserError
from m2jax.data import tfds_set
from m2jax.eval import prompts
from m2jax.eval.sets import records
from m2jax.eval.sets.records import Captioned, DataSet, Labelled, Made, Place

LABELS = ("label", "labels")
CAPTIONS = ("captions", "caption")


def read(place: Place) -> DataSet:
    """``tfds:NAME`` in TFDS's default folder, or the folder of one version of a data set.

    Raises:
        UserError: it cannot be read, or has no field that a suite can ask about.
    """
    folder = place.path if place.path.is_dir() else None
    name = "" if folder else str(place.path)
    rows, features = tfds_set.open_split(name, place.split, folder)
    if "image" not in features:
        raise UserError(f"tfds:{place.path}: records have no field 'image': use another data set")
    images = Made(len(rows), lambda row: _picture(_row(place, rows, row)["image"], place, row))
    # TFDS decodes whole records: this pass over labels or captions decodes every picture once.
    for field in CAPTIONS:
        if field in features:
            captions = [_texts(_row(place, rows, i)[field]) for i in range(len(rows))]
            language = place.language or records.language_of([t for c in captions for t in c])
            return Captioned(images, {language: captions})
    for field in LABELS:
        if field in features:
            return _labelled(place, images, rows, field, features[field])
    raise UserError(f"tfds:{place.path}: has none of {', '.join(LABELS + CAPTIONS)}: use another")


def _labelled(place: Place, images: Made, rows: Any, field: str, feature: Any) -> Labelled:
    values = [np.ravel(_row(place, rows, i)[field]) for i in range(len(rows))]
    inner = getattr(feature, "feature", feature)  # of a Sequence
    names = list(getattr(inner, "names", None) or ())
    if not names and place.names is None:
        raise UserError(f"tfds:{place.path}: classes have no names: give them with --classes FILE")
    count = len(names) or len(next(iter((place.names or {}).values())))
    multi = field == "labels"
    labels = [frozenset(int(x) for x in row) for row in values]
    if any(not 0 <= x < count for row in labels for x in row):
        raise UserError(f"tfds:{place.path}: a label past the {count} classes: mend --classes")
    keys = names or [str(i) for i in range(count)]
    own = [name.replace("_", " ") for name in names] or None
    classes = records.named(place, keys, own)
    return Labelled(images, labels, classes, prompts.TEMPLATES, multi)


def _row(place: Place, rows: Any, row: int) -> Mapping[str, Any]:
    """One record; its pictures are decoded by TFDS."""
    try:
        return rows[row]
    except Exception as error:  # the decoders' errors have no common base
        raise UserError(
            f"tfds:{place.path}: record {row} cannot be read ({error}): prepare it again"
        ) from error


def _picture(pixels: np.ndarray, place: Place, row: int) -> Image.Image:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] not in (1, 3, 4):
        raise UserError(
            f"tfds:{place.path}: record {row}: {pixels.dtype} {pixels.shape} is no picture: use "
            "another data set"
        )
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def _texts(value: Any) -> list[str]:
    """Captions as TFDS gives them: a text, texts, or records with a field ``text``."""
    if isinstance(value, Mapping):
        value = value["text"]
    found = [value] if isinstance(value, (bytes, str)) else list(value)
    return [each.decode() if isinstance(each, bytes) else str(each) for each in found]
