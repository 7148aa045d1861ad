# SPDX-License-Identifier: Apache-2.0
"""Metric writers: one JSON object per logged step, and the same numbers for TensorBoard."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from tensorboardX import SummaryWriter


class MetricWriter:
    """Appends to ``metrics.jsonl`` and to an event file under ``tensorboard/``.

    Args:
        workdir: the run's folder.
        step: the step the run goes on from; rows past it, and a torn last line, are dropped first.
    """

    def __init__(self, workdir: Path, step: int) -> None:
        path = workdir / "metrics.jsonl"
        drop_rows_after(path, step)
        rows = read_rows(path)
        self.seconds = rows[-1].get("seconds", 0.0) if rows else 0.0  # the run has taken so far
        self._file: TextIO = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one row and flushes it."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes both files."""
        self._file.close()
        self._board.close()


def read_rows(path: Path) -> list[dict[str, float]]:
    """The whole rows of a ``metrics.jsonl``; a torn last line is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break  # a process died inside this line; nothing after it can be trusted
    return rows


def drop_rows_after(path: Path, step: int) -> None:
    """Cuts a metrics file back to rows up to ``step``, atomically."""
    if not path.exists():
        return
    rows = [row for row in read_rows(path) if row["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(temporary, path)
