# SPDX-License-Identifier: Apache-2.0
"""Files of the work folder: a unit's results appear whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

from m2jax.config import UserError

WRITER = "group_size:1"  # each record can be read alone
CHUNK = 1024  # records in memory at a time


@contextlib.contextmanager
def folder(place: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name when the block ends well.

    Two workers may fill the same one (Beam starts slow work twice): the first to end is taken.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    try:
        yield temporary
        try:
            os.rename(temporary, place)
        except OSError:
            if not place.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def records(file: Path) -> Iterator[array_record_module.ArrayRecordWriter]:
    """A writer of records that closes its file."""
    writer = array_record_module.ArrayRecordWriter(str(file), WRITER)
    try:
        yield writer
    finally:
        writer.close()


class Reader:
    """The records of a file, read at random.

    Args:
        file: the file.
        records: how many it must hold; -1: not known. A damaged file reads as an empty one.

    Raises:
        UserError: the file is missing or damaged.
    """

    def __init__(self, file: Path, records: int = -1) -> None:
        try:
            if not file.is_file():
                raise FileNotFoundError("no such file")
            self._reader = array_record_module.ArrayRecordReader(str(file))
            if records not in (-1, len(self)):
                raise ValueError(f"{len(self)} records of {records}")
        except Exception as error:  # the library raises what C++ threw
            raise UserError(f"{file}: unreadable ({error}): start the build anew") from error

    def __len__(self) -> int:
        return self._reader.num_records()

    def at(self, rows: list[int]) -> list[bytes]:
        """Records by number."""
        return self._reader.read(rows) if rows else []

    def close(self) -> None:
        """Closes the file."""
        self._reader.close()


def write_json(file: Path, value: Any) -> None:
    """JSON that is the same for the same value."""
    file.write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")


def read_json(file: Path) -> Any:
    """Inverse of ``write_json``."""
    return json.loads(file.read_text("utf-8"))


def write_arrays(file: Path, **arrays: np.ndarray) -> None:
    """Arrays by name."""
    with file.open("wb") as out:
        np.savez(out, **arrays)  # pyright: ignore[reportArgumentType]


def read_arrays(file: Path) -> dict[str, np.ndarray]:
    """Inverse of ``write_arrays``."""
    with np.load(file) as found:
        return {name: found[name] for name in found.files}


def sha256(file: Path) -> str:
    """Checksum of a file."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
