# SPDX-License-Identifier: Apache-2.0
"""What every reader of a collection gives: units of work, and the samples of one unit."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from m2jax.data.build.records import Caption, Rejected

IMAGE_BYTES = 2**28  # of an encoded image; more is not honest
TEXT_BYTES = 2**20


class Source(NamedTuple):
    """One collection that goes into a build."""

    name: str
    kind: str  # a row of readers.KINDS
    files: tuple[Path, ...]
    weight: float = 1.0  # copies of each record; 0.25 keeps one in four
    licence: str = "unknown"
    language: str = ""  # of captions that do not say theirs
    evaluation: bool = False  # what it shows is kept out of the shards, and so is it

    def label(self, file: Path) -> str:
        """What a file is called within the source: its path from the folder that all share."""
        return file.absolute().relative_to(_shared(self.files)).as_posix()


@functools.lru_cache(maxsize=64)
def _shared(files: tuple[Path, ...]) -> str:
    return os.path.commonpath([file.absolute().parent for file in files])


@dataclass(frozen=True)
class Unit:
    """A part of a source that is read in one go; small enough to be done again after a kill."""

    source: int  # index
    number: int  # of the unit in its source
    file: Path
    span: Mapping[str, int] = field(default_factory=dict)  # which part of the file; reader's own


@dataclass(frozen=True)
class Sample:
    """What a reader found: not looked into yet."""

    key: str  # FILE#PLACE, the file by its last name
    image: bytes
    captions: tuple[Caption, ...]
    url: str = ""


class Reader(Protocol):
    """The reader of one kind of collection."""

    def units(self, file: Path) -> list[Mapping[str, int]]:
        """The spans that a file is read in.

        Raises:
            UserError: the file cannot be opened, or is of another kind.
        """
        ...

    def read(self, unit: Unit, source: Source) -> Iterator[Sample | Rejected]:
        """The samples of a unit, in a fixed order; what cannot be read comes with its reason.

        Damage is never an exception: what lies past it is lost and one ``Rejected`` says so.
        """
        ...


def caption(data: bytes | str, language: str) -> Caption | None:
    """A caption of raw bytes; ``None`` where they are no UTF-8."""
    if isinstance(data, str):
        return Caption(data, language)
    try:
        return Caption(data.decode("utf-8"), language)
    except UnicodeDecodeError:
        return None


def inside(folder: Path, name: str) -> Path | None:
    """The file called ``name`` in a folder; ``None`` where the name leads out of it.

    Symbolic links are followed first, so that one that points elsewhere is refused as well.
    """
    if "\0" in name:
        return None
    folder = folder.resolve()
    path = (folder / name).resolve()
    return path if path.is_relative_to(folder) else None


def image_file(folder: Path, name: str, key: str) -> bytes | Rejected:
    """The bytes of an image that a table names."""
    try:
        path = inside(folder, name)
        if path is None:
            return Rejected(key, "path outside", f"{name!r} leads out of {folder.name}")
        if not path.is_file():
            return Rejected(key, "missing image", f"no file {name!r}")
        if path.stat().st_size > IMAGE_BYTES:
            return Rejected(key, "image too large", f"{path.stat().st_size:,} bytes")
        return path.read_bytes()
    except (OSError, ValueError, RuntimeError) as error:  # names of lone surrogates, loops of links
        why = error.strerror if isinstance(error, OSError) else "no file can be called so"
        return Rejected(key, "missing image", f"{name!r:.200}: {why}")
