# SPDX-License-Identifier: Apache-2.0
"""The line a person watches: step, loss, samples per second, time left."""

from __future__ import annotations

import sys
import time
from typing import TextIO


class Progress:
    """Prints a status line per logged step; over itself on a terminal, else one below the other."""

    def __init__(self, steps: int, start: int, out: TextIO | None = None) -> None:
        self._steps, self._start = steps, start
        self._out = out or sys.stdout
        self._begin = time.perf_counter()
        self._over = self._out.isatty()

    def show(self, step: int, loss: float, samples_per_s: float) -> None:
        """Shows where the run is."""
        done = max(step - self._start, 1)
        left = (time.perf_counter() - self._begin) / done * (self._steps - step)
        line = (
            f"step {step}/{self._steps}  loss {loss:.4f}  {samples_per_s:,.0f} samples/s  "
            f"{int(left // 60)}:{int(left % 60):02d} left"
        )
        self._print(line, end="\r" if self._over and step < self._steps else "\n")

    def note(self, text: str) -> None:
        """Says something that stays on the screen."""
        self._print(text, end="\n")

    def _print(self, line: str, *, end: str) -> None:
        print(f"{line:<78}" if self._over else line, end=end, file=self._out, flush=True)
