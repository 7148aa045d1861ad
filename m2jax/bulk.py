# SPDX-License-Identifier: Apache-2.0
"""Features of whole shards: the model on a mesh, one file of features per shard.

A file that is there is done, so a run that was stopped goes on; memory is that of a few batches,
however many records there are. Processes share no work: each takes its part of the shards
(``part``), on the devices of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from m2jax import bundle as bundle_lib
from m2jax.bundle import Bundle
from m2jax.config import UserError
from m2jax.data import feature_files
from m2jax.data.ahead import ahead
from m2jax.data.feature_files import Row
from m2jax.data.pairs import Pair, Pairs
from m2jax.data.shards import ShardPairs, manifest_row
from m2jax.data.tars import TarPairs
from m2jax.dist.mesh import local_mesh

SETTINGS = "embed.json"
ENDS = 2**20  # bytes of a shard's beginning and end that tell it from others
SKIPPED = ".skipped.jsonl"  # after a shard's name: rows that could not be read, where there are any


@dataclass(frozen=True)
class Options:
    """How features are made."""

    format: str = "parquet"  # parquet | array_record
    batch: int = 256  # records at once, over all devices
    texts: bool = True  # of the captions too
    split: int = 1  # devices that one copy of the parameters is spread over
    threads: int = os.cpu_count() or 1  # that decode images
    part: tuple[int, int] = (0, 1)  # this process's part of the shards: index, of how many


class Done(NamedTuple):
    """What a run did."""

    shards: int
    records: int
    skipped: int


def embed_shards(
    model: str,
    shards: Sequence[Path],
    out: Path,
    options: Options,
    say: Callable[[str], None] = print,
) -> Done:
    """Writes the features of every shard that has none yet.

    Args:
        model: whatever ``m2jax.load`` takes.
        shards: ArrayRecord files of a build, or webdataset tars.
        out: folder for the features.
        options: how.
        say: gets a line per shard.

    Raises:
        UserError: an input that cannot be, or ``out`` holds features of another model.
    """
    names = [_name(shard, options) for shard in shards]
    if len(set(names)) != len(names):
        raise UserError("--shards: two have the same name: embed them into different folders")
    settings = {
        "model": str(model),
        "checkpoint": bundle_lib.resolved(model),
        "format": options.format,
        "texts": options.texts,
    }
    _claim(out, settings, dict(zip(names, map(_mark, shards), strict=True)))
    index, count = options.part
    mine = [(shard, out / name) for shard, name in zip(shards, names, strict=True)][index::count]
    left = [(shard, file) for shard, file in mine if not file.exists()]
    if len(left) < len(mine):
        say(f"embed: {len(mine) - len(left)} of {len(mine)} shards were done already")
    if not left:
        return Done(0, 0, 0)
    encoder = _Encoder(model, options)
    records = skipped = 0
    for number, (shard, file) in enumerate(left, 1):
        found, missed = _shard(encoder, shard, file, options, out)
        records, skipped = records + found, skipped + missed
        say(f"embed: {number}/{len(left)} {file.name}: {found:,} records, {missed} unreadable")
    return Done(len(left), records, skipped)


def _name(shard: Path, options: Options) -> str:
    """The name of a shard's features."""
    stem = shard.name.removesuffix(".tar").replace(".array_record", "")
    if options.format not in feature_files.SUFFIXES:
        raise UserError(
            f"--format {options.format}: use one of {', '.join(feature_files.SUFFIXES)}"
        )
    return stem + feature_files.SUFFIXES[options.format]


def _mark(shard: Path) -> dict[str, object]:
    """What tells a shard from another of its name: its size and a checksum.

    That of the build's manifest where one lies beside it, else of the file's first and last MiB.
    """
    try:
        size = shard.stat().st_size
        stated = manifest_row(shard).get("sha256")
        if stated:
            return {"bytes": size, "sha256": stated}
        with shard.open("rb") as file:
            ends = file.read(ENDS)
            file.seek(max(size - ENDS, 0))
            return {"bytes": size, "ends": hashlib.sha256(ends + file.read(ENDS)).hexdigest()}
    except (OSError, ValueError) as error:
        raise UserError(f"{shard}: unreadable ({error}): copy it again") from error


def _claim(out: Path, settings: Mapping[str, object], shards: Mapping[str, object]) -> None:
    """Takes the folder, or finds that it is that of a run like this one.

    Args:
        out: the folder.
        settings: of all its features.
        shards: marks of the shards by the name of their features; those of an earlier run stay.
    """
    file = out / SETTINGS
    try:
        out.mkdir(parents=True, exist_ok=True)
        found = json.loads(file.read_text()) if file.exists() else {**settings, "shards": {}}
        if not isinstance(found, dict) or not isinstance(found.get("shards"), dict):
            raise ValueError(f"{SETTINGS} names no shards")
        marks = found.pop("shards")
        if found != settings:
            raise UserError(f"--out {out}: holds features of {found}: choose another folder")
        for name, mark in shards.items():
            if (out / name).exists() and marks.get(name) != mark:
                raise UserError(
                    f"--out {out}: {name} is of another shard of that name: choose another folder"
                )
        temporary = out / f".{SETTINGS}.{os.getpid()}"
        saved = {**settings, "shards": {**marks, **shards}}
        temporary.write_text(json.dumps(saved, indent=1, sort_keys=True) + "\n")
        temporary.replace(file)
    except (OSError, ValueError) as error:
        raise UserError(f"--out {out}: {error}: choose another folder") from error


def _opened(shard: Path, out: Path) -> Pairs:
    """The pairs of a shard."""
    if shard.suffix == ".tar":
        return TarPairs([shard], out / ".indices", language="")
    return ShardPairs([shard])


class _Batch(NamedTuple):
    """Records read ahead."""

    ids: list[str]
    pixels: np.ndarray  # [records, size, size, 3]
    texts: list[str]
    languages: list[tuple[str, ...]]  # of each record
    skipped: list[tuple[int, str]]  # rows that could not be read, and why


def _read(pairs: Pairs, bundle: Bundle, options: Options, rows: range, stem: str) -> _Batch:
    """Decodes the rows of a batch."""
    found: list[tuple[str, Pair]] = []
    skipped: list[tuple[int, str]] = []
    for row in rows:
        try:
            if isinstance(pairs, ShardPairs):
                record = pairs.record(row)
                found.append((record.key, pairs.pair(record)))
            else:
                found.append((f"{stem}#{row}", pairs.read(row)))
        except UserError as error:
            skipped.append((row, str(error)))
    texts: list[str] = []
    languages: list[tuple[str, ...]] = []
    for _, pair in found:
        several = [
            (language, text)
            for language, said in sorted(pair.texts.items())
            for text in (said if isinstance(said, tuple) else (said,))
        ]
        texts += [text for _, text in several] if options.texts else []
        languages.append(tuple(lang for lang, _ in several) if options.texts else ())
    pixels = bundle.preprocess([pair.image for _, pair in found]) if found else np.zeros((0,))
    return _Batch([key for key, _ in found], pixels, texts, languages, skipped)


class _Encoder:
    """A model on the mesh of this process's devices, fed in batches of one shape."""

    def __init__(self, model: str, options: Options) -> None:
        self.bundle = bundle_lib.load(model, mesh=local_mesh(options.split))
        self.batch = options.batch

    def images(self, pixels: np.ndarray) -> np.ndarray:
        """Features [n, dim] float32 of as many images as a batch holds, or fewer."""
        (full,) = self._full(pixels)
        return np.asarray(self.bundle.encode_image(full), np.float32)[: len(pixels)]

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Features [n, dim] float32 of any number of texts."""
        found = []
        for first in range(0, len(texts), self.batch):
            tokens = self.bundle.tokenize(texts[first : first + self.batch])
            features = self.bundle.encode_text(*self._full(tokens.ids, tokens.mask))
            found.append(np.asarray(features, np.float32)[: len(tokens.ids)])
        return np.concatenate(found)

    def _full(self, *arrays: np.ndarray) -> Iterator[np.ndarray]:
        """The arrays filled up to a batch: one shape is compiled once."""
        for array in arrays:
            yield array[np.arange(self.batch) % len(array)]


def _shard(
    encoder: _Encoder, shard: Path, file: Path, options: Options, out: Path
) -> tuple[int, int]:
    """Embeds one shard; returns records written and rows passed over."""
    pairs, size = _opened(shard, out), encoder.batch
    writer = feature_files.writer(options.format, file)
    skipped: list[tuple[int, str]] = []
    records = 0

    def read(number: int) -> _Batch:
        rows = range(number * size, min((number + 1) * size, len(pairs)))
        return _read(pairs, encoder.bundle, options, rows, shard.stem)

    try:
        batches = ahead(-(-len(pairs) // size), read, threads=options.threads, buffer=2)
        for batch in batches:
            skipped += batch.skipped
            if not batch.ids:
                continue
            for row in _rows(encoder, batch):
                writer.add(row)
            records += len(batch.ids)
        _write_skipped(file, skipped)
        writer.close()
    except BaseException:
        writer.abandon()
        raise
    return records, len(skipped)


def _rows(encoder: _Encoder, batch: _Batch) -> Iterator[Row]:
    images = encoder.images(batch.pixels)
    texts = (
        encoder.texts(batch.texts) if batch.texts else np.zeros((0, images.shape[1]), np.float32)
    )
    first = 0
    for key, image, languages in zip(batch.ids, images, batch.languages, strict=True):
        yield Row(key, image, languages, texts[first : first + len(languages)])
        first += len(languages)


def _write_skipped(file: Path, skipped: Sequence[tuple[int, str]]) -> None:
    """Names the rows without features; before the features, which say that a shard is done."""
    target = file.with_name(file.stem + SKIPPED)
    if not skipped:
        target.unlink(missing_ok=True)
        return
    lines = (json.dumps({"row": row, "why": why}, ensure_ascii=False) for row, why in skipped)
    target.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
