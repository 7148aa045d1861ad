# SPDX-License-Identifier: Apache-2.0
"""Chinese-CLIP's pairs of files: SPLIT_imgs.tsv and SPLIT_texts.jsonl beside it.

A line of the first is an image's id, a tab and its file in Base64 (plain or URL-safe). A line of
the second is ``{"text_id": 1, "text": "...", "image_ids": [...]}``.
"""

from __future__ import annotations

import base64
import binascii
import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path

from m2jax.config import UserError
from m2jax.data.build.readers import base
from m2jax.data.build.readers.base import Sample, Source, Unit
from m2jax.data.build.records import Caption, Rejected
from m2jax.data.text import well_formed

IMAGES, TEXTS = "_imgs.tsv", "_texts.jsonl"
UNIT_BYTES = 2**28  # of the first file
LINE_BYTES = base.IMAGE_BYTES * 4 // 3 + 100
URL_SAFE = bytes.maketrans(b"-_", b"+/")


class Tsv64:
    """A unit is a stretch of the images; each makes an index of all texts, on disk if need be."""

    def units(self, file: Path) -> list[Mapping[str, int]]:
        """See ``Reader``."""
        if not file.name.endswith(IMAGES):
            raise UserError(f"{file}: name the ..{IMAGES} files, their texts are found beside them")
        for needed in (file, texts_of(file)):
            if not needed.is_file():
                raise UserError(f"{needed}: no such file: both {IMAGES} and {TEXTS} are needed")
        size = file.stat().st_size
        return [
            {"begin": at, "end": min(at + UNIT_BYTES, size)} for at in range(0, size, UNIT_BYTES)
        ]

    def read(self, unit: Unit, source: Source) -> Iterator[Sample | Rejected]:
        """See ``Reader``: a line belongs to the unit in which its first byte lies."""
        name, begin, end = unit.file.name, unit.span["begin"], unit.span["end"]
        with closing(sqlite3.connect("")) as index, unit.file.open("rb") as lines:
            # On disk once it outgrows SQLite's cache: texts of a hundred million images fit.
            bad = _index(index, texts_of(unit.file))
            if begin == 0:
                yield from bad
            if begin:
                lines.seek(begin - 1)
                _skip_line(lines)
            while lines.tell() < end:
                at = lines.tell()
                line = lines.readline(LINE_BYTES)
                if len(line) == LINE_BYTES and not line.endswith(b"\n"):
                    yield Rejected(f"{name}#byte {at}", "image too large", "a line without end")
                    _skip_line(lines)
                elif line.strip():
                    yield _sample(f"{name}#", at, line, index, source.language)


def texts_of(file: Path) -> Path:
    """The file of texts beside one of images; any other file itself."""
    if not file.name.endswith(IMAGES):
        return file
    return file.with_name(file.name.removesuffix(IMAGES) + TEXTS)


def _skip_line(lines) -> None:
    """Goes past the next end of a line."""
    while (part := lines.readline(2**16)) and not part.endswith(b"\n"):
        pass


def _index(index: sqlite3.Connection, file: Path) -> list[Rejected]:
    """Texts by image id; returns the lines that are none.

    A text is held once: a line of a megabyte may name a hundred thousand images.
    """
    index.execute("CREATE TABLE texts (place INTEGER PRIMARY KEY, text TEXT)")
    index.execute("CREATE TABLE images (image TEXT, place INTEGER)")
    bad: list[Rejected] = []

    def rows() -> Iterator[tuple[str, int]]:
        with file.open("rb") as lines:
            for number, line in enumerate(iter(lambda: lines.readline(base.TEXT_BYTES), b""), 1):
                if len(line) == base.TEXT_BYTES and not line.endswith(b"\n"):
                    _skip_line(lines)
                    bad.append(Rejected(f"{file.name}#line {number}", "damaged text", "too long"))
                    continue
                try:
                    found = json.loads(line)
                    ids, text = found["image_ids"], found["text"]
                    if not isinstance(text, str) or not isinstance(ids, list):
                        raise TypeError("text and image_ids are of other kinds")
                    names = list(dict.fromkeys(map(str, ids)))
                    "".join(names).encode()  # SQLite takes no lone surrogates
                except (ValueError, TypeError, KeyError, RecursionError) as error:
                    kind = "text not UTF-8" if isinstance(error, UnicodeError) else "damaged text"
                    bad.append(Rejected(f"{file.name}#line {number}", kind, str(error)[:200]))
                    continue
                index.execute("INSERT INTO texts VALUES (?, ?)", (number, well_formed(text)))
                yield from ((one, number) for one in names)

    index.executemany("INSERT INTO images VALUES (?, ?)", rows())
    index.execute("CREATE INDEX by_image ON images (image, place)")
    return bad


def _sample(
    prefix: str, at: int, line: bytes, index: sqlite3.Connection, language: str
) -> Sample | Rejected:
    """One line of the images."""
    head, tab, data = line.rstrip(b"\r\n").partition(b"\t")
    number = head.decode("utf-8", "replace")
    key = f"{prefix}{number}"
    if not tab:
        return Rejected(f"{prefix}byte {at}", "damaged row", "no tab between id and image")
    try:
        image = base64.b64decode(data.translate(URL_SAFE), validate=True)
    except (binascii.Error, ValueError) as error:
        return Rejected(key, "damaged row", f"no Base64: {error}")
    ask = "SELECT text FROM images JOIN texts USING (place) WHERE image = ? ORDER BY place"
    captions = tuple(Caption(text, language) for (text,) in index.execute(ask, (number,)))
    return Sample(key, image, captions)
