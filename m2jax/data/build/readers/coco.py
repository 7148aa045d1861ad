# SPDX-License-Identifier: Apache-2.0
"""COCO-style caption files: a JSON object with ``images`` and ``annotations``.

Images lie beside the file, or in the folder ``images`` there. An image's captions follow the order
of the annotations.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from m2jax.config import UserError
from m2jax.data.build.readers import base
from m2jax.data.build.readers.base import Sample, Source, Unit
from m2jax.data.build.records import Caption, Rejected

UNIT_IMAGES = 5_000
FOLDER = "images"


class Coco:
    """A unit is a range of the images."""

    def units(self, file: Path) -> list[Mapping[str, int]]:
        """See ``Reader``."""
        try:
            count = len(_lists(file)[0])
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{file}: no COCO captions ({error}): mend the file") from error
        except OSError as error:
            raise UserError(f"{file}: {error.strerror}: mend --source") from error
        return [
            {"begin": at, "end": min(at + UNIT_IMAGES, count)}
            for at in range(0, count, UNIT_IMAGES)
        ]

    def read(self, unit: Unit, source: Source) -> Iterator[Sample | Rejected]:
        """See ``Reader``."""
        name, begin = unit.file.name, unit.span["begin"]
        images, annotations = _lists(unit.file)
        wanted = images[begin : unit.span["end"]]
        texts: dict[Any, list[Caption]] = {_id(image): [] for image in wanted}
        for number, row in enumerate(annotations):
            if not isinstance(row, dict) or not isinstance(row.get("caption"), str):
                if begin == 0:  # once per file
                    yield Rejected(f"{name}#annotation {number}", "damaged text", "no caption")
            elif (place := texts.get(_key(row.get("image_id")))) is not None:
                place.append(Caption(row["caption"], source.language))
        folder = unit.file.parent
        if (folder / FOLDER).is_dir():
            folder = folder / FOLDER
        for number, row in enumerate(wanted, begin):
            key = f"{name}#{number}"
            file = row.get("file_name") if isinstance(row, dict) else None
            if not isinstance(file, str):
                yield Rejected(key, "damaged row", "the image has no file_name")
                continue
            image = base.image_file(folder, file, key)
            if isinstance(image, Rejected):
                yield image
                continue
            url = row.get("coco_url") or row.get("flickr_url")
            captions = tuple(texts[_id(row)])
            yield Sample(key, image, captions, url if isinstance(url, str) else "")


def _lists(file: Path) -> tuple[list[Any], list[Any]]:
    """Images and annotations."""
    found = json.loads(file.read_bytes())
    if not isinstance(found, dict):
        raise TypeError("no object")
    images, annotations = found.get("images"), found.get("annotations")
    if not isinstance(images, list) or not isinstance(annotations, list):
        raise TypeError("images and annotations must be lists")
    return images, annotations


def _key(number: Any) -> str:
    return json.dumps(number)  # lists and objects cannot be keys


def _id(image: Any) -> str:
    return _key(image.get("id") if isinstance(image, dict) else None)
