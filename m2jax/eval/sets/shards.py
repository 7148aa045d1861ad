# SPDX-License-Identifier: Apache-2.0
"""Webdataset tars, alone or in the folder layout of CLIP_benchmark.

That layout is ``classnames.txt``, ``zeroshot_classification_templates.txt`` and
``dataset_type.txt`` (classification, multilabel, retrieval) beside ``SPLIT/nshards.txt`` and
``SPLIT/0.tar`` ...; samples have ``cls`` (a class number), ``npy`` (zeros and ones) or ``txt`` (a
caption per line). Tars alone say by these members what they are. Members are never unpacked.
"""

from __future__ import annotations

import glob
import io
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from m2jax.config import UserError
from m2jax.data import npz
from m2jax.data.image import open_image
from m2jax.data.tars import IMAGE_BYTES, IMAGES, TEXT_BYTES
from m2jax.eval.sets import records
from m2jax.eval.sets.names import check_templates
from m2jax.eval.sets.records import Captioned, DataSet, Labelled, Place

LABELS = ("cls", "npy", "txt")
MOST_SHARDS = 100_000


class Member(NamedTuple):
    """Where a file lies."""

    file: Path
    offset: int
    size: int
    where: str  # for messages


@dataclass(frozen=True)
class Pictures:
    """The images of tars; see ``records.Images``."""

    members: Sequence[Member]

    def __len__(self) -> int:
        return len(self.members)

    def read(self, row: int) -> Image.Image:
        """See ``records.Images``."""
        member = self.members[row]
        return open_image(io.BytesIO(_bytes(member, IMAGE_BYTES)), member.where)


def read(place: Place) -> DataSet:
    """Tars by a pattern, or a folder as CLIP_benchmark writes it.

    Raises:
        UserError: files are missing or damaged; the message names the file and the sample.
    """
    folder = place.path.is_dir()
    files = _listed(place) if folder else [Path(f) for f in sorted(glob.glob(str(place.path)))]
    if not files:
        raise UserError(f"{place.path}: matches no file: mend the path")
    kind, samples = "", list[dict[str, Member]]()
    for file in files:
        samples += _samples(file)
    for label in LABELS:
        if all(label in sample for sample in samples):
            kind = label
    if not samples or not kind:
        raise UserError(
            f"{files[0]}: samples need an image and a label, all the same kind ({', '.join(LABELS)}"
            "): mend the shards"
        )
    images = Pictures([sample["image"] for sample in samples])
    labels = [sample[kind] for sample in samples]
    if kind == "txt":
        captions = [_lines(member) for member in labels]
        language = place.language or records.language_of([t for each in captions for t in each])
        return Captioned(images, {language: captions})
    return _labelled(place if folder else place._replace(path=files[0]), images, labels, kind)


def is_benchmark(path: Path) -> bool:
    """Whether a folder has CLIP_benchmark's layout."""
    return path.is_dir() and any(path.glob("*/nshards.txt"))


def _listed(place: Place) -> list[Path]:
    """The shards of a split."""
    count = place.path / place.split / "nshards.txt"
    try:
        number = int(count.read_text())
    except (OSError, ValueError) as error:
        splits = sorted(p.parent.name for p in place.path.glob("*/nshards.txt"))
        raise UserError(f"{count}: {error}: use --split {' or '.join(splits) or 'test'}") from error
    if not 0 < number <= MOST_SHARDS:
        raise UserError(f"{count}: {number} shards: write their number")
    return [place.path / place.split / f"{i}.tar" for i in range(number)]


def _samples(file: Path) -> list[dict[str, Member]]:
    """Members of a tar by sample: the image, and those with a label."""
    found: dict[str, dict[str, Member]] = {}
    try:
        length = file.stat().st_size
        with tarfile.open(file, "r:") as tar:
            for info in tar:
                key, _, kind = info.name.rpartition("/")[2].partition(".")
                kind = "image" if kind.lower() in IMAGES else kind.lower()
                if info.offset_data + info.size > length:
                    raise UserError(f"{file}: cut off inside {info.name!r}: copy it again")
                if (kind == "image" or kind in LABELS) and info.isreg() and not info.issparse():
                    whole = f"{info.name.rpartition('/')[0]}/{key}"
                    member = Member(file, info.offset_data, info.size, f"{file}: {info.name!r}")
                    found.setdefault(whole, {})[kind] = member
                # tarfile would keep every header in memory.
                tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise UserError(
            f"{file}: no plain tar ({error}): unpack compression, or copy it again"
        ) from error
    return [sample for sample in found.values() if "image" in sample]


def _bytes(member: Member, limit: int) -> bytes:
    if member.size > limit:
        raise UserError(f"{member.where}: {member.size:,} bytes: over the limit of {limit:,}")
    try:
        handle = os.open(member.file, os.O_RDONLY)
        try:
            data = os.pread(handle, member.size, member.offset)
        finally:
            os.close(handle)
    except OSError as error:
        raise UserError(f"{member.where}: {error.strerror}: is it still there?") from error
    if len(data) != member.size:
        raise UserError(f"{member.where}: cut off: the file has changed")
    return data


def _lines(member: Member) -> list[str]:
    try:
        lines = [line for line in _bytes(member, TEXT_BYTES).decode().splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"{member.where}: not UTF-8: mend it") from error
    if not lines:
        raise UserError(f"{member.where}: no caption: leave the sample out")
    return lines


def _labelled(place: Place, images: Pictures, members: Sequence[Member], kind: str) -> Labelled:
    multi = kind == "npy"
    labels = [_shown(member, multi=multi) for member in members]
    names = _text_lines(place.path / "classnames.txt")
    count = len(names or next(iter((place.names or {"": ()}).values())))
    if not count:
        raise UserError(f"{place.path}: has no classnames.txt: give names with --classes FILE")
    wrong = [
        m.where for m, shown in zip(members, labels, strict=True) if max(shown, default=0) >= count
    ]
    if wrong:
        raise UserError(f"{wrong[0]}: a class past the {count} named: mend it")
    keys = names or [str(number) for number in range(count)]
    file = place.path / "zeroshot_classification_templates.txt"
    prompts = [line for line in _text_lines(file) if line]
    if prompts:
        check_templates(prompts, str(file))
    templates = {records.language_of(prompts): prompts} if prompts else {}
    return Labelled(images, labels, records.named(place, keys, names or None), templates, multi)


def _shown(member: Member, *, multi: bool) -> frozenset[int]:
    """The classes of one sample."""
    data = _bytes(member, TEXT_BYTES)
    try:
        if not multi:
            return frozenset([_natural(data)])
        row = npz.read_npy(io.BytesIO(data), len(data))
        if row.ndim != 1 or not np.isin(row, (0, 1)).all():
            raise ValueError("no row of zeros and ones")
        return frozenset(np.flatnonzero(row).tolist())
    except npz.DAMAGED as error:
        raise UserError(f"{member.where}: no label ({npz.reason(error)}): mend it") from error


def _natural(data: bytes) -> int:
    number = int(data)
    if number < 0:
        raise ValueError("below 0")
    return number


def _text_lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}: mend it") from error
