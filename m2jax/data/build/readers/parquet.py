# SPDX-License-Identifier: Apache-2.0
"""Parquet tables: images as bytes, or as paths beside the table; captions as text columns.

Columns, by name: the image is ``image`` (bytes, or an object with bytes and path, as the Hub's data
sets have it), ``image_bytes`` or ``jpg``, or ``path`` (or ``file_name``), relative to the table's
folder. Captions are ``caption`` or ``text`` or ``TEXT``, ``en`` and ``zh``, each a string or a list
of strings. ``url`` is kept. Images are not fetched: img2dataset does that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from m2jax.config import UserError
from m2jax.data.build.readers import base
from m2jax.data.build.readers.base import Sample, Source, Unit
from m2jax.data.build.records import Caption, Rejected

BYTES = ("image", "image_bytes", "jpg")
PATHS = ("path", "file_name")
ROW_BYTES = base.IMAGE_BYTES + 16 * base.TEXT_BYTES
CAPTIONS = {"caption": "", "text": "", "TEXT": "", "en": "en", "zh": "zh"}  # and their language
# Rows decoded at a time. Many may point at one large value of a dictionary, which Arrow copies for
# each: 256 rows of a file of 900 bytes take 1 GB. One by one costs 40 microseconds a row more.
ROWS = 1


class Parquet:
    """A unit is a row group."""

    def units(self, file: Path) -> list[Mapping[str, int]]:
        """See ``Reader``."""
        try:
            with pq.ParquetFile(file) as table:
                columns = set(table.schema_arrow.names)
                groups = table.num_row_groups
        except (OSError, pa.ArrowException) as error:
            return [{"damaged": 1}] if file.is_file() else _missing(file, error)
        if not columns & {*BYTES, *PATHS} or not columns & set(CAPTIONS):
            raise UserError(
                f"{file}: columns {sorted(columns)!r:.200}: needs one of {(*BYTES, *PATHS)} and "
                f"one of {tuple(CAPTIONS)}: rename them"
            )
        return [{"group": group} for group in range(groups)]

    def read(self, unit: Unit, source: Source) -> Iterator[Sample | Rejected]:
        """See ``Reader``."""
        name = unit.file.name
        row = 0
        try:
            with pq.ParquetFile(unit.file) as table:
                group = unit.span["group"]
                columns = [c for c in table.schema_arrow.names if c in _WANTED]
                for batch in table.iter_batches(ROWS, row_groups=[group], columns=columns):
                    key = f"{name}#{group}.{row}"
                    row += 1
                    if batch.nbytes > ROW_BYTES:  # before Python copies it
                        yield Rejected(key, "image too large", f"a row of {batch.nbytes:,} bytes")
                        continue
                    for fields in batch.to_pylist():  # one, but for an empty group
                        yield _sample(key, fields, unit.file.parent, source.language)
        except (OSError, pa.ArrowException, KeyError, UnicodeDecodeError) as error:
            place = f"{name}#{unit.span.get('group', 0)}.{row}"
            yield Rejected(place, "damaged file", f"the rest of the row group is lost: {error}")


_WANTED = {*BYTES, *PATHS, *CAPTIONS, "url", "URL"}


def _missing(file: Path, error: Exception) -> list[Mapping[str, int]]:
    raise UserError(f"{file}: {error}: mend --source")


def _sample(key: str, fields: Mapping[str, Any], folder: Path, language: str) -> Sample | Rejected:
    """One row."""
    image: Any = next((fields[c] for c in BYTES if fields.get(c) is not None), None)
    path: Any = next((fields[c] for c in PATHS if fields.get(c)), None)
    if isinstance(image, dict):
        path = image.get("path") or path
        image = image.get("bytes")
    if image is None and isinstance(path, str):
        image = base.image_file(folder, path, key)
    if isinstance(image, Rejected):
        return image
    if image is None:
        return Rejected(key, "missing image", "neither bytes nor a path: fetch the images first")
    if not isinstance(image, bytes):
        return Rejected(key, "missing image", f"the image is no bytes but {type(image).__name__}")
    if len(image) > base.IMAGE_BYTES:
        return Rejected(key, "image too large", f"{len(image):,} bytes")
    captions: list[Caption] = []
    for column, said in CAPTIONS.items():
        value = fields.get(column)
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, (str, bytes)) and text:
                if len(text) > base.TEXT_BYTES:
                    return Rejected(key, "text too long", f"{column}: {len(text):,}")
                found = base.caption(text, said or language)
                if found is None:
                    return Rejected(key, "text not UTF-8", column)
                captions.append(found)
    url = fields.get("url") or fields.get("URL")
    return Sample(key, image, tuple(captions), url if isinstance(url, str) else "")
