# SPDX-License-Identifier: Apache-2.0
"""Metric writers: one JSON object per logged step; the same numbers elsewhere, if asked for."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from tensorboardX import SummaryWriter

from m2jax.config import Log, UserError


class MetricWriter:
    """Appends to ``metrics.jsonl``; to TensorBoard and Weights & Biases where ``log`` says so.

    Args:
        workdir: the run's folder.
        step: the step the run goes on from; rows past it, and a torn last line, are dropped first.
        log: who else hears.
        settings: of the run, for Weights & Biases.

    Raises:
        UserError: ``log.wandb`` without the package, or a project it refuses.
    """

    def __init__(
        self,
        workdir: Path,
        step: int,
        log: Log | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        log = log or Log()
        self._others: list[Any] = []
        if log.wandb:  # first: it may refuse, and then nothing was touched
            self._others.append(_WandB(workdir, log.wandb, settings or {}))
        path = workdir / "metrics.jsonl"
        drop_rows_after(path, step)
        rows = read_rows(path)
        self.seconds = rows[-1].get("seconds", 0.0) if rows else 0.0  # the run has taken so far
        self._file: TextIO = path.open("a", encoding="utf-8")
        if log.tensorboard:
            self._others.append(_TensorBoard(workdir, step))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one row and flushes it."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for other in self._others:
            other.write(step, values)

    def close(self) -> None:
        """Flushes and closes everything."""
        self._file.close()
        for other in self._others:
            other.close()


class _TensorBoard:
    """An event file under ``tensorboard/``."""

    def __init__(self, workdir: Path, step: int) -> None:
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._board.close()


class _WandB:
    """One run on Weights & Biases, the same one for every process that goes on with the run.

    ``WANDB_MODE=offline`` keeps it under WORKDIR/wandb.
    """

    def __init__(self, workdir: Path, project: str, settings: Mapping[str, Any]) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise UserError(
                f"log.wandb={project}: needs the package wandb: pip install wandb"
            ) from None
        name = workdir.absolute()
        identity = hashlib.sha256(str(name).encode()).hexdigest()[:16]
        try:
            self._run = wandb.init(
                project=project,
                id=identity,
                name=name.name,
                dir=str(workdir),
                config=dict(settings),
                resume="allow",
            )
        except wandb.errors.Error as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"log.wandb={project}: {reason}: log in with `wandb login`, or set "
                "WANDB_MODE=offline"
            ) from error

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


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


def drop_rows_after(path: Path, step: float) -> None:
    """Cuts a metrics file back to rows up to ``step``, atomically."""
    if not path.exists():
        return
    rows = [row for row in read_rows(path) if row["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(temporary, path)
