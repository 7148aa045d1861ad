# SPDX-License-Identifier: Apache-2.0
"""What the pages of a Parquet column would take in memory, from their headers alone.

Arrow allocates what a page's header claims, whatever the file's footer says, and a run-length
encoding claims a billion values in ten bytes. The headers are small structs of Thrift's compact
protocol before each page (parquet.thrift, ``PageHeader``); nothing is decompressed to read them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any, NamedTuple

DATA, DICTIONARY, DATA_V2 = 0, 2, 3  # parquet.thrift, PageType
DELTA_BYTE_ARRAY = 7  # parquet.thrift, Encoding: values as what they share with the one before
MOST_PAGES = 2**20  # of a column in a row group
SLACK = 100  # bytes that Arrow reads past the end that writers before 2014 gave
DEPTH = 8  # of structs in structs; a header has 3
MOST_BYTES = 2**31  # of a value in a header, and of a page


class Page(NamedTuple):
    """A page, as its header has it."""

    kind: int
    size: int  # bytes, once decompressed
    values: int  # with those that are missing
    encoding: int


def pages(file: IO[bytes], chunk: Any) -> Iterator[Page]:
    """The pages of a column's part of a row group that Arrow would read.

    Args:
        file: the table, open for reading.
        chunk: what its footer says of that part, a ``pyarrow.parquet.ColumnChunkMetaData``.

    Raises:
        ValueError: a header is none.
    """
    place = chunk.data_page_offset
    if chunk.dictionary_page_offset:
        place = min(place, chunk.dictionary_page_offset)
    end, seen, count = place + chunk.total_compressed_size + SLACK, 0, 0
    while seen < chunk.num_values:
        if not 0 < place < end or count == MOST_PAGES:
            raise ValueError(f"{chunk.path_in_schema}: pages end before their values")
        file.seek(place)
        fields = _struct(file)
        about = fields.get(5) or fields.get(7) or fields.get(8) or {}
        try:
            kind, size, stored = fields[1], fields[2], fields[3]
            values = about.get(1, 0)
            encoding = about.get(4 if kind == DATA_V2 else 2, 0)
            if not 0 <= min(size, stored, values) <= max(size, stored, values) < MOST_BYTES:
                raise ValueError("no size")
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{chunk.path_in_schema}: no page at byte {place}") from error
        yield Page(kind, size, values, encoding)
        count += 1
        seen += values if kind in (DATA, DATA_V2) else 0
        place = file.tell() + stored


def _struct(file: IO[bytes], depth: int = 0) -> dict[int, Any]:
    """A struct's fields by number: numbers and structs; other values are passed over."""
    if depth == DEPTH:
        raise ValueError("structs too deep")
    found, field = {}, 0
    while head := _byte(file):
        step, kind = head >> 4, head & 15
        field = field + step if step else _signed(file)
        # A field's truth is its kind, that of a list's element a byte.
        found[field] = None if kind in (1, 2) else _value(file, kind, depth)
    return found


def _value(file: IO[bytes], kind: int, depth: int) -> Any:
    if kind in (4, 5, 6):
        return _signed(file)
    if kind in (1, 2, 3):
        return _byte(file)
    if kind == 12:
        return _struct(file, depth + 1)
    if kind in (7, 8):
        file.seek(8 if kind == 7 else min(_number(file), MOST_BYTES), 1)
        return None
    raise ValueError(f"a value of kind {kind}")  # lists and maps: no header has them


def _byte(file: IO[bytes]) -> int:
    data = file.read(1)
    if not data:
        raise ValueError("the file ends")
    return data[0]


def _number(file: IO[bytes]) -> int:
    found = 0
    for shift in range(0, 70, 7):
        part = _byte(file)
        found |= (part & 127) << shift
        if part < 128:
            return found
    raise ValueError("a number without end")


def _signed(file: IO[bytes]) -> int:
    number = _number(file)
    return (number >> 1) ^ -(number & 1)
