# SPDX-License-Identifier: Apache-2.0
"""Features of many records in files that appear whole: Parquet, or ArrayRecord.

Columns: ``id``; ``image`` [dim]; ``language`` and ``text`` [captions, dim], one per caption. (A
record of ArrayRecord is a ``tf.train.Example``; its ``text`` is flat.) Features are float32. Rows
go to the disk a group at a time, so memory does not grow with their number.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Float32

from m2jax.config import UserError

GROUP = 4096  # rows in memory at a time
SUFFIXES = {"parquet": ".parquet", "array_record": ".array_record"}


class Row(NamedTuple):
    """The features of one record."""

    id: str
    image: Float32[np.ndarray, " dim"]
    languages: tuple[str, ...]
    text: Float32[np.ndarray, "captions dim"]


class Writer(Protocol):
    """A file of features that is being written."""

    def add(self, row: Row) -> None:
        """One more row."""
        ...

    def close(self) -> None:
        """Ends the file and gives it its name."""
        ...

    def abandon(self) -> None:
        """Removes what was written."""
        ...


def writer(kind: str, file: Path) -> Writer:
    """A writer of a kind of file.

    Raises:
        UserError: an unknown kind, or its library is not installed.
    """
    if kind not in SUFFIXES:
        raise UserError(f"--format {kind}: unknown: use one of {', '.join(SUFFIXES)}")
    return _Parquet(file) if kind == "parquet" else _ArrayRecord(file)


def _temporary(file: Path) -> Path:
    for left in file.parent.glob(f".{file.name}.*"):  # by a run that was killed
        left.unlink(missing_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    umask = os.umask(0)
    os.umask(umask)
    os.fchmod(handle, 0o666 & ~umask)  # mkstemp lets nobody else read
    os.close(handle)
    return Path(name)


class _Parquet:
    def __init__(self, file: Path) -> None:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ModuleNotFoundError as error:
            raise UserError("--format parquet: needs pyarrow: pip install pyarrow") from error
        self._pa, self._pq = pa, pq
        self._file, self._temporary = file, _temporary(file)
        self._rows: list[Row] = []
        self._open: Any = None

    def add(self, row: Row) -> None:
        self._rows.append(row)
        if len(self._rows) == GROUP:
            self._flush()

    def _flush(self) -> None:
        pa, rows = self._pa, self._rows
        if not rows:
            return
        dim = len(rows[0].image)
        vector = pa.list_(pa.float32(), dim)

        def vectors(values: list[np.ndarray]) -> Any:
            flat = np.concatenate(values).astype(np.float32, copy=False).ravel()
            return pa.FixedSizeListArray.from_arrays(pa.array(flat), dim)

        counts = np.cumsum([0, *(len(row.languages) for row in rows)])
        texts = vectors([row.text for row in rows])
        table = pa.table(
            {
                "id": [row.id for row in rows],
                "image": vectors([row.image for row in rows]),
                "language": pa.array([list(r.languages) for r in rows], pa.list_(pa.string())),
                "text": pa.ListArray.from_arrays(pa.array(counts, pa.int32()), texts),
            }
        )
        if self._open is None:
            self._open = self._pq.ParquetWriter(self._temporary, table.schema)
        assert table.schema.field("image").type == vector
        self._open.write_table(table)
        self._rows = []

    def close(self) -> None:
        self._flush()
        if self._open is None:
            raise UserError(f"{self._file}: no record could be read: look at the shard")
        self._open.close()
        self._temporary.replace(self._file)

    def abandon(self) -> None:
        self._temporary.unlink(missing_ok=True)


class _ArrayRecord:
    def __init__(self, file: Path) -> None:
        from array_record.python import (
            array_record_module,  # pyright: ignore[reportAttributeAccessIssue]
        )
        from tensorflow_datasets.proto import tf_example_generated_pb2

        self._file, self._temporary = file, _temporary(file)
        self._example: Any = vars(tf_example_generated_pb2)["Example"]
        self._open = array_record_module.ArrayRecordWriter(str(self._temporary), "group_size:1")

    def add(self, row: Row) -> None:
        example = self._example()
        fields = example.features.feature
        fields["id"].bytes_list.value.append(row.id.encode("utf-8", "replace"))
        fields["image"].float_list.value.extend(row.image.tolist())
        fields["language"].bytes_list.value.extend(name.encode() for name in row.languages)
        fields["text"].float_list.value.extend(row.text.ravel().tolist())
        self._open.write(example.SerializeToString(deterministic=True))

    def close(self) -> None:
        self._open.close()
        self._temporary.replace(self._file)

    def abandon(self) -> None:
        self._open.close()
        self._temporary.unlink(missing_ok=True)
