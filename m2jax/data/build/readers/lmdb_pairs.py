# SPDX-License-Identifier: Apache-2.0
"""Chinese-CLIP's LMDB folders: ``imgs`` and ``pairs`` side by side.

``imgs`` holds Base64 by image id; ``pairs`` holds, by running number, a pickled tuple of image id,
text id and text. A pickle can run code, so one that asks for anything by its name is refused.
"""

from __future__ import annotations

import base64
import binascii
import io
import pickle
import pickletools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lmdb

from m2jax.config import UserError
from m2jax.data.build.readers import base
from m2jax.data.build.readers.base import Sample, Source, Unit
from m2jax.data.build.readers.tsv64 import URL_SAFE
from m2jax.data.build.records import Caption, Rejected

UNIT_ROWS = 20_000
MEMO = 1000  # objects that a pickle numbers, at most: Python makes room for all up to the last


class LmdbPairs:
    """A unit is a range of the pairs; each is a record with one caption."""

    def units(self, file: Path) -> list[Mapping[str, int]]:
        """See ``Reader``; ``file`` is the folder that holds both."""
        with _opened(file / "pairs") as pairs, pairs.begin() as rows:
            stored = rows.get(b"num_samples")
            try:
                count = int(stored) if stored else rows.stat()["entries"]
            except ValueError:
                raise UserError(
                    f"{file}/pairs: num_samples {stored!r}: no number: mend it"
                ) from None
            count = min(count, rows.stat()["entries"])
        with _opened(file / "imgs"):
            pass
        return [
            {"begin": at, "end": min(at + UNIT_ROWS, count)} for at in range(0, count, UNIT_ROWS)
        ]

    def read(self, unit: Unit, source: Source) -> Iterator[Sample | Rejected]:
        """See ``Reader``."""
        name = unit.file.name
        try:
            with (
                _opened(unit.file / "pairs") as pairs,
                _opened(unit.file / "imgs") as images,
                pairs.begin() as rows,
                images.begin() as files,
            ):
                for number in range(unit.span["begin"], unit.span["end"]):
                    row = rows.get(str(number).encode())
                    yield _sample(f"{name}#{number}", row, files, source.language)
        except lmdb.Error as error:
            yield Rejected(name, "damaged file", f"the rest of the unit is lost: {error}")


def _opened(folder: Path) -> Any:
    """An LMDB environment, read-only.

    Raises:
        UserError: there is none.
    """
    if not (folder / "data.mdb").is_file():
        raise UserError(f"{folder}: no data.mdb: name the folder that holds pairs and imgs")
    try:
        found = lmdb.open(str(folder), readonly=True, lock=False, readahead=False, max_readers=64)
    except lmdb.Error as error:
        raise UserError(f"{folder}: no LMDB ({error}): copy it again") from error
    # Pages past the end of the file are in the map all the same: to touch one kills the process.
    needed = (found.info()["last_pgno"] + 1) * found.stat()["psize"]
    size = (folder / "data.mdb").stat().st_size
    if size < needed:
        found.close()
        raise UserError(
            f"{folder}: data.mdb is cut off: {size:,} bytes of {needed:,}: copy it again"
        )
    return found


class _Plain(pickle.Unpickler):
    """A pickle of numbers, texts and tuples; anything that must be looked up by name is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("asks for an object outside")


def _pair(row: bytes) -> tuple[bytes, str]:
    """The image's key and the text of a pickled pair; raises what a hostile one leads to."""
    for code, argument, _ in pickletools.genops(row):  # also finds lengths past the end
        if "PUT" in code.name and int(argument or 0) > MEMO:
            raise pickle.UnpicklingError(f"numbers an object {argument}")
    image_id, _, text = _Plain(io.BytesIO(row)).load()
    if not isinstance(text, str) or not isinstance(image_id, (int, str)):
        raise TypeError("not an id, an id and a text")
    return str(image_id).encode(), text


def _sample(key: str, row: bytes | None, files: Any, language: str) -> Sample | Rejected:
    """One pair."""
    if row is None:
        return Rejected(key, "damaged row", "no such pair")
    if len(row) > base.TEXT_BYTES:
        return Rejected(key, "damaged row", f"{len(row):,} bytes")
    try:
        image_id, text = _pair(row)
    except Exception as error:  # what a hostile pickle raises is anybody's guess
        return Rejected(key, "damaged row", f"no plain pair: {error}"[:200])
    try:
        data = files.get(image_id)
    except lmdb.BadValsizeError:  # an empty key, or a long one
        data = None
    if data is None:
        return Rejected(key, "missing image", f"no image {image_id.decode()!r:.80}")
    try:
        image = base64.b64decode(bytes(data).translate(URL_SAFE), validate=True)
    except (binascii.Error, ValueError) as error:
        return Rejected(key, "damaged row", f"no Base64: {error}")
    return Sample(key, image, (Caption(text, language),))
