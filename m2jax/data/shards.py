# SPDX-License-Identifier: Apache-2.0
"""Image-text pairs in the shards of ``m2jax data build shards``, read at random by Grain."""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grain.sources import ArrayRecordDataSource

from m2jax.config import UserError
from m2jax.data.build import records, work
from m2jax.data.build.records import Record
from m2jax.data.image import open_image
from m2jax.data.pairs import Pair

PATTERN = "*.array_record*"
MANIFEST = "manifest.json"  # of the build


class ShardPairs:
    """Several shards as one list of pairs.

    Args:
        files: the shards, or folders of them.
        at_least: as for ``open_image``.

    Raises:
        UserError: a folder or file without records.
    """

    def __init__(self, files: Sequence[Path], *, at_least: int = 0) -> None:
        self.files = shard_files(files)
        self._at_least = at_least
        try:
            self._source: Any = ArrayRecordDataSource([str(file) for file in self.files])
            self._rows = len(self._source)
            _compare(self.files, self._rows)
        except Exception as error:  # the library raises what C++ threw
            why = str(error) or type(error).__name__
            raise UserError(
                f"{self.files[0]} ...: unreadable shards ({why}): copy them again"
            ) from error

    def __len__(self) -> int:
        return self._rows

    def record(self, row: int) -> Record:
        """The record itself, its image still encoded.

        Raises:
            UserError: it is damaged.
        """
        where = f"{self.files[0].parent}: record {row}"
        try:
            data = self._source[row]
        except Exception as error:
            raise UserError(f"{where}: unreadable ({error}): copy the shards again") from error
        return records.decode(data, where)

    def read(self, row: int) -> Pair:
        """One record; see ``Pairs``. Of several captions in a language, all."""
        return self.pair(self.record(row))

    def pair(self, record: Record) -> Pair:
        """A record as a pair.

        Raises:
            UserError: its image cannot be decoded.
        """
        texts: dict[str, tuple[str, ...]] = {}
        for caption in record.captions:
            if caption.text:
                said = texts.get(caption.language, ())
                texts[caption.language] = (*said, caption.text)
        image = open_image(io.BytesIO(record.image), record.key, at_least=self._at_least)
        return Pair(image, texts)


def _compare(files: Sequence[Path], rows: int) -> None:
    """Holds the rows against the manifest's, where one lies beside each file.

    ArrayRecord takes a file that was cut off for an empty one.
    """
    expected = 0
    for file in files:
        count = manifest_row(file).get("records")
        if count is None:
            return
        expected += count
    if rows != expected:
        raise ValueError(f"{rows} records where the manifest has {expected}")


def manifest_row(file: Path) -> Mapping[str, Any]:
    """What the manifest beside a shard states of it: records, bytes, sha256; empty without one.

    Raises:
        ValueError: the manifest is damaged.
    """
    manifest = file.parent / MANIFEST
    return (
        _stated(manifest, manifest.stat().st_mtime_ns).get(file.name, {})
        if manifest.is_file()
        else {}
    )


@functools.lru_cache(maxsize=8)
def _stated(manifest: Path, _changed: int) -> dict[str, Mapping[str, Any]]:
    try:
        return {shard["file"]: shard for shard in work.read_json(manifest)["shards"]}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{manifest.name} lists no shards") from error


def shard_files(paths: Sequence[Path]) -> list[Path]:
    """The shards that paths name, those of a folder in order of their names.

    Raises:
        UserError: a folder holds none, or a file is empty.
    """
    found: list[Path] = []
    for path in paths:
        inside = sorted(path.glob(PATTERN)) if path.is_dir() else [path]
        if not inside:
            raise UserError(f"{path}: holds no ArrayRecord files: name the folder of a build")
        found += inside
    for file in found:
        if not file.is_file() or not file.stat().st_size:
            raise UserError(f"{file}: missing or empty: copy it again")
    return found
