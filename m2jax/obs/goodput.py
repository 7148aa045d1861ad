# SPDX-License-Identifier: Apache-2.0
"""Where the time of a run went: ``goodput.jsonl``, one row per logged step.

Time of a process is booked in full, each second under one name: ``init`` (before the first step),
``compile`` (the first call of the step), ``data`` (waiting for a batch, devices idle), ``step``,
``save`` (what saving blocks), ``evaluation``. A process that goes on from step n finds what earlier
ones did past it ``lost``. Time between processes, and before ``run`` begins, is nobody's.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from m2jax.obs.metrics import drop_rows_after, read_rows

KINDS = ("init", "compile", "data", "step", "save", "evaluation")
REDONE = ("data", "step")  # what is lost with the steps it was spent on
FILE = "goodput.jsonl"


class Goodput:
    """Books the time of this process, and sums up those before it.

    Args:
        workdir: the run's folder.
        clock: seconds; steadily growing.
        writes: whether this process, of those of a run, is the one that writes the file.
    """

    def __init__(
        self,
        workdir: Path,
        clock: Callable[[], float] = time.perf_counter,
        *,
        writes: bool = True,
    ) -> None:
        self._path, self._clock, self._writes = workdir / FILE, clock, writes
        self._since = clock()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._past: defaultdict[str, float] = defaultdict(float)
        self._begun_at = 0
        self._process = f"{time.time_ns():x}-{os.getpid()}"  # tells rows of processes apart

    def start(self, step: int) -> None:
        """The run goes on from ``step``."""
        self._begun_at = step
        if self._writes:
            drop_rows_after(self._path, math.inf)  # a torn last line would hide all that follow
        self._past = total(read_rows(self._path), step)

    def book(self, kind: str) -> None:
        """The time since the last booking was spent on this."""
        now = self._clock()
        self.seconds[kind] += now - self._since
        self._since = now

    def write(self, step: int) -> None:
        """Appends a row: what this process has spent after ``step`` steps."""
        if not self._writes:
            return
        spent = {kind: self.seconds.get(kind, 0.0) for kind in KINDS}
        row = {"step": step, "process": self._process, "from": self._begun_at, "seconds": spent}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def share(self) -> float:
        """Seconds in steps that count, of all seconds of the run so far, lost ones included."""
        whole = sum(self._past.values()) + sum(self.seconds.values())
        return (self._past["step"] + self.seconds["step"]) / max(whole, 1e-9)


def total(rows: Sequence[Mapping[str, Any]], step: int) -> defaultdict[str, float]:
    """Seconds of a run by kind, ``lost`` among them, when it goes on from ``step``.

    Args:
        rows: of ``goodput.jsonl``, in order; each process counts its seconds from 0.
        step: steps past it, and past what later processes began with, were lost.
    """
    found: defaultdict[str, float] = defaultdict(float)
    kept_up_to = step
    for process in reversed(_processes(rows)):
        last = process[-1]
        kept = [row for row in process if row["step"] <= kept_up_to]
        for kind in KINDS:
            if kind not in REDONE:
                found[kind] += last["seconds"][kind]
                continue
            useful = kept[-1]["seconds"][kind] if kept else 0.0
            found[kind] += useful
            found["lost"] += last["seconds"][kind] - useful
        kept_up_to = min(kept_up_to, last["from"])
    return found


def _processes(rows: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Rows by process, in the order they began."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["process"], []).append(row)
    return list(found.values())
