# SPDX-License-Identifier: Apache-2.0
"""Image-text pairs in plain tar files laid out as webdataset writes them, read at random.

Members whose names agree up to the first dot of the last component are one sample: an image
(jpg, jpeg, png, webp) and its texts (txt; en.txt; or json, an object of texts by language). A tar
is indexed once by reading its headers; after that a sample is one ``pread`` per member, anywhere.
Members are never unpacked, so their names are no paths; links and the like are not followed.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import tempfile
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from m2jax.config import UserError
from m2jax.data.image import open_image
from m2jax.data.pairs import Pair

IMAGES = ("jpg", "jpeg", "png", "webp")
IMAGE_BYTES = 2**28  # of an encoded image; more is not honest
TEXT_BYTES = 2**20
OPEN_FILES = 64  # tars a process keeps open
INDEX = 1  # version of the index files


class Member(NamedTuple):
    """Where one member of a sample lies."""

    sample: str  # the key
    kind: str  # what follows the first dot: jpg, txt, en.txt, json
    offset: int
    size: int


class TarPairs:
    """Several tars as one list of pairs, in the order of the tars and of their members.

    Args:
        files: the tars.
        cache: folder for the indices.
        language: of ``.txt`` captions.
        at_least: as for ``open_image``.

    Raises:
        UserError: a file is no plain tar, is cut off, or holds no image with a text.
    """

    def __init__(
        self, files: Sequence[Path], cache: Path, *, language: str, at_least: int = 0
    ) -> None:
        self._files, self._language, self._at_least = list(files), language, at_least
        self._index = [_indexed(file, cache) for file in self._files]
        samples = [len(rows) for _, rows in self._index]
        self._first = np.cumsum([0, *samples])
        self._handles = _Handles()

    def __len__(self) -> int:
        return int(self._first[-1])

    def read(self, row: int) -> Pair:
        """One sample; see ``Pairs``."""
        shard = int(np.searchsorted(self._first, row, side="right")) - 1
        file, (kinds, rows) = self._files[shard], self._index[shard]
        image, texts = None, {}
        where = f"{file}: sample {row - self._first[shard]}"
        for kind, offset, size in rows[row - self._first[shard]]:
            if size < 0:
                continue  # this sample has fewer members than others
            name = kinds[kind]
            limit = IMAGE_BYTES if name in IMAGES else TEXT_BYTES
            if size > limit:
                raise UserError(f"{where}: .{name} of {size:,} bytes: over the limit of {limit:,}")
            data = self._handles.read(file, int(offset), int(size), where)
            if name in IMAGES:
                data, label = io.BytesIO(data), f"{where} (.{name})"
                image = open_image(data, label, at_least=self._at_least)
            else:
                texts |= _texts(name, data, self._language, where)
        if image is None:
            raise UserError(f"{where}: has no image: leave it out")
        return Pair(image, texts)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_handles": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _handles=_Handles())


def _texts(kind: str, data: bytes, language: str, where: str) -> dict[str, str]:
    """The texts of one member by language; no empty ones."""
    try:
        if kind == "json":
            found = json.loads(data)
            if not isinstance(found, dict):
                raise ValueError("no object of texts by language")
            texts = {str(k): v for k, v in found.items() if isinstance(v, str)}
        else:
            texts = {kind.removesuffix("txt").rstrip(".") or language: data.decode("utf-8")}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: damaged .{kind} ({error}): mend or leave it out") from error
    return {name: text.strip() for name, text in texts.items() if text.strip()}


class _Handles:
    """Open tars of one process, the least recently used closed first."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, int] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, file: Path, offset: int, size: int, where: str) -> bytes:
        """Bytes of a file; ``pread`` leaves no position behind, so threads may share a handle."""
        try:
            with self._lock:
                if file not in self._open:
                    self._open[file] = os.open(file, os.O_RDONLY)
                self._open.move_to_end(file)
                while len(self._open) > OPEN_FILES:
                    os.close(self._open.popitem(last=False)[1])
                handle = os.dup(self._open[file])  # stays valid if another thread closes it
            try:
                data = os.pread(handle, size, offset)
            finally:
                os.close(handle)
        except OSError as error:
            raise UserError(f"{where}: {error.strerror}: is the file still there?") from error
        if len(data) != size:
            raise UserError(f"{where}: cut off: the file is shorter than when it was indexed")
        return data

    def __del__(self) -> None:
        for handle in self._open.values():
            os.close(handle)


# Kinds of member, and per sample and slot (kind, offset, size); size -1: the slot is empty.
Index = tuple[list[str], np.ndarray]


def _indexed(file: Path, cache: Path) -> Index:
    """The index of a tar, from the cache if the file is still the one it was made of."""
    try:
        stat = file.stat()
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}: mend data.files") from error
    identity = f"{INDEX} {file.absolute()} {stat.st_size} {stat.st_mtime_ns}"
    saved = cache / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.npz"
    try:
        with saved.open("rb") as file_of_index, np.load(file_of_index) as found:
            return [str(kind) for kind in found["kinds"]], found["rows"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # not made yet, or damaged: it is made anew
    kinds, rows = _index(file, stat.st_size)
    cache.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=cache, suffix=".tmp")
    with os.fdopen(handle, "wb") as out:
        np.savez(out, kinds=np.asarray(kinds), rows=rows)
    os.replace(name, saved)
    return kinds, rows


def _index(file: Path, length: int) -> Index:
    """Reads every header of a tar."""
    samples: dict[str, list[Member]] = {}
    for member in _members(file):
        if member.offset + member.size > length:
            raise UserError(f"{file}: cut off inside {member.sample}.{member.kind}: copy it again")
        samples.setdefault(member.sample, []).append(member)
    whole = [
        members
        for members in samples.values()
        if any(m.kind in IMAGES for m in members) and any(m.kind not in IMAGES for m in members)
    ]
    if not whole:
        raise UserError(
            f"{file}: holds no image ({', '.join(IMAGES)}) with a text of the same name (txt, "
            "LANGUAGE.txt, json): mend data.files"
        )
    kinds = sorted({m.kind for members in whole for m in members})
    rows = np.full((len(whole), max(map(len, whole)), 3), -1, np.int64)
    for row, members in enumerate(whole):
        for slot, m in enumerate(members):
            rows[row, slot] = kinds.index(m.kind), m.offset, m.size
    return kinds, rows


def _members(file: Path) -> Iterator[Member]:
    """The images and texts of a tar."""
    try:
        with tarfile.open(file, "r:") as tar:
            for info in tar:
                folder, _, last = info.name.rpartition("/")
                key, _, kind = last.partition(".")
                kind = kind.lower()
                wanted = kind in (*IMAGES, "json", "txt") or kind.endswith(".txt")
                if wanted and info.isreg() and not info.issparse():
                    yield Member(f"{folder}/{key}", kind, info.offset_data, info.size)
                # tarfile would keep every header in memory.
                tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise UserError(
            f"{file}: no plain tar ({error}): unpack compression, or copy it again"
        ) from error
