# SPDX-License-Identifier: Apache-2.0
"""Parquet tables: images as bytes, or as paths beside the table; captions as text columns.

Columns, by name: the image is ``image`` (bytes, or an object with bytes and path, as the Hub's data
sets have it), ``image_bytes`` or ``jpg``, or ``path`` (or ``file_name``), relative to the table's
folder. Captions are ``caption`` or ``text`` or ``TEXT``, ``en`` and ``zh``, each a string or a list
of strings. ``url`` is kept. Images are not fetched: img2dataset does that.

A file of a kilobyte can claim rows of gigabytes, so what is read is bounded before it is: page by
page (``parquet_pages``), lists as numbers of texts that are each held once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from m2jax.config import UserError
from m2jax.data.build.readers import base, parquet_pages
from m2jax.data.build.readers.base import Sample, Source, Unit
from m2jax.data.build.records import Caption, Rejected

BYTES = ("image", "image_bytes", "jpg")
PATHS = ("path", "file_name")
ROW_BYTES = base.IMAGE_BYTES + 16 * base.TEXT_BYTES
CAPTIONS = {"caption": "", "text": "", "TEXT": "", "en": "en", "zh": "zh"}  # and their language
PARTS = ("bytes", "path")  # of an image that is an object
# Rows decoded at a time. Many may point at one large value of a dictionary, which Arrow copies for
# each: 256 rows of a file of 900 bytes take 1 GB. One by one costs 40 microseconds a row more.
ROWS = 1
LIST_ROWS = 1024  # of columns of lists, whose texts are held once each
LIST_TEXTS = 2**24  # of a row group's column of lists; 8 bytes each
LIST_BYTES = 2**30  # of a row group's column of lists, once decompressed
ROW_TEXTS = 4096  # of one row's list
PAGE_BYTES = 2**31  # of the pages that are in memory at a time: a dictionary and a page per column
# Not the whole row group at once, which is Arrow's default: one may be all of a file of 100 GB.
STREAMED = {"pre_buffer": False, "buffer_size": 2**20}


class Parquet:
    """A unit is a row group."""

    def units(self, file: Path) -> list[Mapping[str, int]]:
        """See ``Reader``."""
        try:
            with pq.ParquetFile(file) as table:
                columns = set(table.schema_arrow.names)
                groups = table.num_row_groups
                odd = _leaves(table).odd
        except (OSError, pa.ArrowException) as error:
            return [{"damaged": 1}] if file.is_file() else _missing(file, error)
        if not columns & {*BYTES, *PATHS} or not columns & set(CAPTIONS):
            raise UserError(
                f"{file}: columns {sorted(columns)!r:.200}: needs one of {(*BYTES, *PATHS)} and "
                f"one of {tuple(CAPTIONS)}: rename them"
            )
        if odd:
            raise UserError(
                f"{file}: column {odd}: images are bytes or objects with bytes and path, captions "
                "strings or lists of strings: rewrite or rename it"
            )
        return [{"group": group} for group in range(groups)]

    def read(self, unit: Unit, source: Source) -> Iterator[Sample | Rejected]:
        """See ``Reader``."""
        name, group = unit.file.name, unit.span.get("group", 0)
        row = 0
        try:
            for found in _rows(unit.file, unit.span["group"]):
                key = f"{name}#{group}.{row}"
                row += 1
                if isinstance(found, _Refused):
                    yield Rejected(key, found.reason, found.detail)
                else:
                    yield _sample(key, found, unit.file.parent, source.language)
        except _Bomb as error:
            yield Rejected(f"{name}#{group}", "decompression bomb", str(error))
        except (OSError, pa.ArrowException, KeyError, ValueError) as error:
            place = f"{name}#{group}.{row}"
            yield Rejected(place, "damaged file", f"the rest of the row group is lost: {error}")


_WANTED = {*BYTES, *PATHS, *CAPTIONS, "url", "URL"}


class _Bomb(Exception):
    """A row group that would take too much memory; says why."""


class _Refused(NamedTuple):
    """A row that would."""

    reason: str
    detail: str


class _Leaves(NamedTuple):
    """The columns that are read, by their paths in Parquet's terms."""

    flat: list[str]
    lists: list[str]  # of texts
    odd: str  # a column of another shape, and its type; "": there is none


def _leaves(table: pq.ParquetFile) -> _Leaves:
    paths = [table.schema.column(i) for i in range(len(table.schema.names))]
    flat, lists, odd = list[str](), list[str](), ""
    for field in table.schema_arrow:
        name, kind = field.name, field.type
        inside = [leaf for leaf in paths if leaf.path.split(".")[0] == name]
        if name not in _WANTED:
            continue
        if not pa.types.is_nested(kind):
            flat.append(name)
        elif name in CAPTIONS and _is_list(kind) and not pa.types.is_nested(kind.value_type):
            lists += [leaf.path for leaf in inside if leaf.physical_type == "BYTE_ARRAY"]
        elif name in BYTES and pa.types.is_struct(kind):
            parts = [part for part in kind if part.name in PARTS]
            flat += [f"{name}.{part.name}" for part in parts]
            if not parts or any(pa.types.is_nested(part.type) for part in parts):
                odd = f"{name} ({kind})"
        else:
            odd = f"{name} ({kind})"
    return _Leaves(flat, lists, odd[:200])


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _rows(file: Path, group: int) -> Iterator[Mapping[str, Any] | _Refused]:
    """The wanted columns of each row.

    Raises:
        _Bomb: before anything is read.
        ValueError: the columns are not as long as the file says.
    """
    with pq.ParquetFile(file, **STREAMED) as table:
        leaves, rows = _leaves(table), 0
        _check(file, table.metadata.row_group(group), leaves)
        with pq.ParquetFile(file, read_dictionary=leaves.lists, **STREAMED) as other:
            lists = _lists(other, group, leaves.lists)
            for batch in table.iter_batches(ROWS, row_groups=[group], columns=leaves.flat):
                for _ in range(batch.num_rows):  # one, but for an empty group
                    texts = next(lists)
                    rows += 1
                    if batch.nbytes > ROW_BYTES:  # before Python copies it
                        yield _Refused("image too large", f"a row of {batch.nbytes:,} bytes")
                    elif isinstance(texts, _Refused):
                        yield texts
                    else:
                        yield {**batch.to_pylist()[0], **texts}
        if rows != table.metadata.row_group(group).num_rows:
            raise ValueError(f"{rows} rows of {table.metadata.row_group(group).num_rows}")


def _check(file: Path, group: Any, leaves: _Leaves) -> None:
    """Refuses a row group whose columns would not fit into memory.

    Raises:
        _Bomb: that is so.
        ValueError: the headers of its pages are damaged.
    """
    held = 0
    with file.open("rb") as opened:
        for number in range(group.num_columns):
            chunk = group.column(number)
            column = chunk.path_in_schema
            if column not in leaves.flat and column not in leaves.lists:
                continue
            texts = total = largest = dictionary = 0
            for page in parquet_pages.pages(opened, chunk):
                if page.kind == parquet_pages.DICTIONARY:
                    dictionary = max(dictionary, page.size)
                    continue
                texts, total, largest = (
                    texts + page.values,
                    total + page.size,
                    max(largest, page.size),
                )
                if column in leaves.lists and page.encoding == parquet_pages.DELTA_BYTE_ARRAY:
                    raise _Bomb(f"{column}: lists in DELTA_BYTE_ARRAY: write another encoding")
            if column in leaves.lists and (texts > LIST_TEXTS or total > LIST_BYTES):
                raise _Bomb(
                    f"{column}: {texts:,} texts, {total:,} bytes in one row group: write smaller "
                    "row groups"
                )
            held += dictionary + largest
    if held > PAGE_BYTES:
        raise _Bomb(f"{held:,} bytes of pages at once: write smaller pages")


def _lists(
    table: pq.ParquetFile, group: int, leaves: Sequence[str]
) -> Iterator[Mapping[str, list[Any]] | _Refused]:
    """The texts of each row's lists, by column; without such columns as many rows as are asked."""
    while not leaves:
        yield {}
    for batch in table.iter_batches(LIST_ROWS, row_groups=[group], columns=leaves):
        columns = {name: batch.column(name) for name in batch.schema.names}
        sizes = {name: _sizes(column.values) for name, column in columns.items()}
        ends = {name: column.offsets.to_numpy() for name, column in columns.items()}
        for row in range(batch.num_rows):
            found: dict[str, list[Any]] = {}
            for name, column in columns.items():
                first, last = ends[name][row], ends[name][row + 1]
                size = sizes[name][last] - sizes[name][first]
                if last - first > ROW_TEXTS or size > ROW_BYTES:
                    detail = f"{name}: {last - first:,} texts of {size:,} bytes"
                    yield _Refused("text too long", detail)
                    break
                found[name] = column.values.slice(first, last - first).to_pylist()
            else:
                yield found


def _sizes(texts: pa.Array) -> np.ndarray:
    """Bytes of all texts before each, and of all [texts + 1]; a missing one has none."""
    dictionary = isinstance(texts, pa.DictionaryArray)
    held = texts.dictionary if dictionary else texts
    lengths = pc.binary_length(held)  # pyright: ignore[reportAttributeAccessIssue]
    lengths = np.append(lengths.fill_null(0).to_numpy(), 0)
    rows = texts.indices.fill_null(-1).to_numpy() if dictionary else np.arange(len(texts))
    return np.append(0, np.cumsum(lengths[rows], dtype=np.int64))


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
