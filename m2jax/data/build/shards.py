# SPDX-License-Identifier: Apache-2.0
"""Last stage: what is left, shuffled over the shards of the data set.

Where a record goes is a hash of its key. First every unit lists its rows by shard; then every shard
fetches the rows that belong to it and writes them in the order of their hashes. Both are pieces of
work of bounded memory that can be done in any order and again.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from m2jax.data.build import duplicates, stage_read, stage_score, work
from m2jax.data.build.plan import Plan
from m2jax.data.build.readers.base import Unit
from m2jax.data.build.records import Rejected, decode, features
from m2jax.data.build.stage_score import left

NAME = "m2jax_pairs"
SPLIT = "train"
VERSION = "1.0.0"
OPEN_READERS = 64
COPIES = "copies by weight"
_ROW = np.dtype([("hash", "<u8"), ("row", "<u4"), ("copy", "<u4")])


class Listed(NamedTuple):
    """What a unit has to give."""

    rows: int  # records written, copies included
    counts: dict[str, int]


def file_name(index: int, shards: int) -> str:
    """The name of a shard, by TFDS's rule."""
    return f"{NAME}-{SPLIT}.array_record-{index:05d}-of-{shards:05d}"


def _list_place(plan: Plan, ordinal: int) -> Path:
    return plan.work / "list" / f"{ordinal:06d}"


def list_unit(plan: Plan, ordinal: int, unit: Unit, parts: int) -> Listed:
    """Lists the rows of a unit that go into shards, by the hash of their key.

    Writes ``rows.npy``, sorted by hash, and adds what duplicates took to ``set_aside.jsonl``.
    """
    target = _list_place(plan, ordinal)
    if not (target / stage_read.COUNTS).exists():
        with work.folder(target) as folder:
            _list(plan, ordinal, unit, parts, folder)
    counts = work.read_json(target / stage_read.COUNTS)
    return Listed(counts.pop("rows"), counts)


def _list(plan: Plan, ordinal: int, unit: Unit, parts: int, folder: Path) -> None:
    source = plan.sources[unit.source]
    counts: collections.Counter[str] = collections.Counter()
    reader, rows = _kept(plan, ordinal, parts)
    found: list[tuple[int, int, int]] = []
    for first in range(0, len(rows), work.CHUNK):
        places = rows[first : first + work.CHUNK]
        for at, data in zip(places, reader.at(places), strict=True):
            key = decode(data, f"unit {ordinal}: {at}").key
            copies = stage_read.copies(plan.seed, key, source.weight)
            counts[COPIES] += copies - 1
            found += ((stage_read.hashed(plan.seed, key, n), at, n) for n in range(copies))
    reader.close()
    listed = np.array(found, _ROW)
    np.save(folder / "rows.npy", listed[np.argsort(listed["hash"], kind="stable")])
    with (folder / stage_read.SET_ASIDE).open("w", encoding="utf-8") as aside:
        gone = duplicates.gone(plan, parts, ordinal)
        keys = _keys(plan, {f.rank for f in gone} | {f.of for f in gone})
        for one in gone:
            reason = duplicates.REASONS[one.reason]
            counts[reason] += 1
            aside.write(stage_read.line(Rejected(keys[one.rank], reason, f"of {keys[one.of]}")))
    counts = collections.Counter({k: v for k, v in counts.items() if v})
    work.write_json(folder / stage_read.COUNTS, {**counts, "rows": len(listed)})


def _kept(plan: Plan, ordinal: int, parts: int) -> tuple[work.Reader, list[int]]:
    """What holds a unit's records, and the places in it of those that are left."""
    if plan.scoring.model:
        reader = stage_score.reader(plan, ordinal)
        return reader, list(range(len(reader)))
    reader = stage_read.reader(plan, ordinal)
    return reader, left(len(reader), duplicates.gone(plan, parts, ordinal))


def _keys(plan: Plan, ranks: set[int]) -> dict[int, str]:
    """The keys of records by rank."""
    rows: dict[int, list[int]] = collections.defaultdict(list)
    for rank in sorted(ranks):
        rows[rank >> 32].append(rank & 0xFFFFFFFF)
    keys: dict[int, str] = {}
    for ordinal, wanted in rows.items():
        reader = stage_read.reader(plan, ordinal)
        for first in range(0, len(wanted), work.CHUNK):
            part = wanted[first : first + work.CHUNK]
            for row, data in zip(part, reader.at(part), strict=True):
                keys[duplicates.rank(ordinal, row)] = decode(data, f"unit {ordinal}: {row}").key
        reader.close()
    return keys


def _shard_place(plan: Plan, index: int) -> Path:
    return plan.work / "shards" / f"{index:05d}"


def write_shard(plan: Plan, ordinals: Sequence[int], index: int, shards: int) -> dict[str, object]:
    """Writes a shard, unless that was done before.

    Args:
        plan: the build.
        ordinals: of the units that give records.
        index: of the shard.
        shards: how many there are.

    Returns:
        file, records, bytes and sha256.
    """
    target = _shard_place(plan, index)
    if not (target / stage_read.COUNTS).exists():
        with work.folder(target) as folder:
            file = folder / file_name(index, shards)
            rows = _rows(plan, ordinals, index, shards)
            with work.records(file) as out:
                for data in _fetched(plan, rows):
                    out.write(data)
            stated = {"file": file.name, "records": len(rows), "bytes": file.stat().st_size}
            work.write_json(folder / stage_read.COUNTS, {**stated, "sha256": work.sha256(file)})
    return work.read_json(target / stage_read.COUNTS)


_PLACE = np.dtype([("hash", "<u8"), ("ordinal", "<u4"), ("row", "<u4"), ("copy", "<u4")])


def _rows(plan: Plan, ordinals: Sequence[int], index: int, shards: int) -> np.ndarray:
    """The rows of a shard, in its order: a stretch of the hashes."""
    begin, end = (-(-(i << 64) // shards) for i in (index, index + 1))
    parts = []
    for ordinal in ordinals:
        listed = np.load(_list_place(plan, ordinal) / "rows.npy", mmap_mode="r")
        first = np.searchsorted(listed["hash"], np.uint64(begin))
        last = (
            len(listed) if index + 1 == shards else np.searchsorted(listed["hash"], np.uint64(end))
        )
        part = np.zeros(last - first, _PLACE)
        part["ordinal"] = ordinal
        for name in _ROW.names or ():
            part[name] = listed[first:last][name]
        parts.append(part)
    rows = np.concatenate(parts) if parts else np.zeros(0, _PLACE)
    return rows[np.argsort(rows, order=("hash", "ordinal", "row", "copy"), kind="stable")]


def _fetched(plan: Plan, rows: np.ndarray) -> Iterator[bytes]:
    """The records of these rows, read in chunks."""
    readers: collections.OrderedDict[int, work.Reader] = collections.OrderedDict()
    try:
        for first in range(0, len(rows), work.CHUNK):
            chunk = rows[first : first + work.CHUNK]
            found: list[bytes] = [b""] * len(chunk)
            for ordinal in np.unique(chunk["ordinal"]):
                reader = _reader(plan, int(ordinal), readers)
                places = np.flatnonzero(chunk["ordinal"] == ordinal)
                for at, data in zip(places, reader.at(chunk["row"][places].tolist()), strict=True):
                    found[at] = data
            yield from found
    finally:
        for reader in readers.values():
            reader.close()


def _reader(
    plan: Plan, ordinal: int, readers: collections.OrderedDict[int, work.Reader]
) -> work.Reader:
    """The records of a unit, from the readers that are open."""
    if ordinal not in readers:
        stage = stage_score if plan.scoring.model else stage_read
        readers[ordinal] = stage.reader(plan, ordinal)
    readers.move_to_end(ordinal)
    while len(readers) > OPEN_READERS:
        readers.popitem(last=False)[1].close()
    return readers[ordinal]


def write_metadata(plan: Plan, stated: Sequence[dict]) -> None:
    """``features.json`` and ``dataset_info.json``, by which TFDS reads the folder."""
    template = tfds.core.ShardedFileTemplate(
        data_dir=epath.Path(plan.out),
        dataset_name=NAME,
        split=SPLIT,
        filetype_suffix="array_record",
    )
    split = tfds.core.SplitInfo(
        name=SPLIT,
        shard_lengths=[shard["records"] for shard in stated],
        num_bytes=sum(shard["bytes"] for shard in stated),
        filename_template=template,
    )
    tfds.folder_dataset.write_metadata(
        data_dir=plan.out,
        features=features(),
        split_infos=[split],
        version=VERSION,
        filename_template=template,
        check_data=False,
        description="Image-text pairs; manifest.json says where they are from.",
    )
