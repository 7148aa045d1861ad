# SPDX-License-Identifier: Apache-2.0
"""Webdataset tars as img2dataset writes them: KEY.jpg, KEY.txt, KEY.json, read as a stream.

Members whose names agree up to the first dot of the last component, and that follow each other, are
one sample. Nothing is unpacked; members whose names lead out of a folder, and links, are refused
all the same, for such a tar was made to harm.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO

from m2jax.config import UserError
from m2jax.data.build.readers import base
from m2jax.data.build.readers.base import Sample, Source, Unit
from m2jax.data.build.records import Caption, Rejected
from m2jax.data.tars import IMAGES

LANGUAGE = re.compile(r"(en|zh)([-_]\w{1,8})?")  # keys of a .json that hold captions
METADATA = ("json", "txt")


class Tars:
    """A unit is a tar."""

    def units(self, file: Path) -> list[Mapping[str, int]]:
        """See ``Reader``."""
        if not file.is_file():
            raise UserError(f"{file}: no such file: mend --source")
        return [{}]

    def read(self, unit: Unit, source: Source) -> Iterator[Sample | Rejected]:
        """See ``Reader``."""
        name = unit.file.name
        group: dict[str, bytes] = {}
        key = ""
        try:
            # A stream ends with an exception where a member is cut off; "r:" would pass it over.
            with unit.file.open("rb") as handle, tarfile.open(fileobj=handle, mode="r:") as tar:
                for info in tar:
                    tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
                    refused = _refused(info, name)
                    if refused or not info.isreg():
                        yield from refused
                        continue
                    sample, _, kind = _split(info.name)
                    if sample != key:
                        yield from _sample(f"{name}#{key}", group, source.language)
                        key, group = sample, {}
                    if kind in IMAGES or kind in METADATA or kind.endswith(".txt"):
                        group[kind] = _content(tar, handle, info)
                wrong = _after(handle, tar.offset)
            yield from _sample(f"{name}#{key}", group, source.language)
            if wrong:
                yield Rejected(name, "damaged file", wrong)
        except (tarfile.TarError, OSError, EOFError, ValueError) as error:
            yield from _sample(f"{name}#{key}", group, source.language)
            yield Rejected(name, "damaged file", f"no whole tar: {error}")


def _split(name: str) -> tuple[str, str, str]:
    """Key, dot and kind of a member."""
    folder, slash, last = name.rpartition("/")
    key, dot, kind = last.partition(".")
    return folder + slash + key, dot, kind.lower()


def _refused(info: tarfile.TarInfo, name: str) -> list[Rejected]:
    """What is wrong with a member before it is read; nothing for most."""
    path, key = PurePosixPath(info.name), f"{name}#{info.name}"
    if path.is_absolute() or ".." in path.parts or "\0" in info.name:
        return [Rejected(key, "path outside", "the member's name leads out of its folder")]
    if info.issym() or info.islnk() or info.isdev() or info.issparse():
        return [Rejected(key, "link or device", "members must be plain files")]
    limit = base.IMAGE_BYTES if _split(info.name)[2] in IMAGES else base.TEXT_BYTES
    if info.isreg() and info.size > limit:
        return [Rejected(key, "image too large", f"{info.size:,} bytes")]
    return []


def _content(tar: tarfile.TarFile, handle: IO[bytes], info: tarfile.TarInfo) -> bytes:
    """The bytes of a member, all of them."""
    file = tar.extractfile(info)
    data = file.read() if file else b""
    if len(data) != info.size:
        raise EOFError(f"cut off inside {info.name}")
    return data


def _after(handle: IO[bytes], offset: int) -> str:
    """What is wrong with the bytes after the last member; "" where they are a tar's zeros.

    ``tarfile`` takes a header that it cannot read, and a block of zeros, for the end.
    """
    size = handle.seek(0, 2) - offset
    handle.seek(offset)
    if size >= tarfile.BLOCKSIZE:
        while part := handle.read(2**20):
            if any(part):
                return f"bad header at byte {offset}: the rest is lost"
    return "" if size >= 2 * tarfile.BLOCKSIZE else "the tar has no end: it was cut off"


def _sample(key: str, group: Mapping[str, bytes], language: str) -> Iterator[Sample | Rejected]:
    """One sample of its members, by kind."""
    if not group:
        return
    images = [kind for kind in IMAGES if kind in group]
    if not images:
        yield Rejected(key, "missing image", "no jpg, jpeg, png or webp beside its texts")
        return
    captions: list[Caption] = []
    url = ""
    for kind in sorted(set(group) - set(images)):
        if kind != "json":
            found = base.caption(group[kind], kind.removesuffix("txt").rstrip(".") or language)
            if found is None:
                yield Rejected(key, "text not UTF-8", f".{kind}")
            else:
                captions.append(found)
            continue
        fields = _fields(group[kind])
        if fields is None:
            yield Rejected(key, "damaged text", "the .json is no object")
            continue
        url = fields.get("url", "")
        if "txt" not in group and "caption" in fields:
            captions.append(Caption(fields["caption"], language))
        captions += [Caption(fields[k], k) for k in sorted(fields) if LANGUAGE.fullmatch(k)]
    yield Sample(key, group[images[0]], tuple(captions), url)


def _fields(data: bytes) -> dict[str, str] | None:
    """The texts of a metadata object; ``None`` where it is none."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    return {k: v for k, v in found.items() if isinstance(v, str)}
