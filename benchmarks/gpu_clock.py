# SPDX-License-Identifier: Apache-2.0
"""What every part of benchmarks/gpu.py shares: timing, the card's facts, and rows that are kept."""

import json
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

WINDOW_S = 0.4  # of one timed window: many calls, one wait at its end
LEAST_WINDOWS, MOST_WINDOWS = 3, 9
PAUSE = 8.0  # seconds that must be left before another case begins


class Rows:
    """Rows of one part, each written out when it is known, so that a killed part keeps them.

    Args:
        path: one JSON object a line.
        seconds: the part may take; what does not fit is recorded as not run.
    """

    def __init__(self, path: Path, seconds: float):
        self.path, self.end = path, time.monotonic() + seconds

    def add(self, case: dict, **values) -> None:
        """Keeps what was measured of a case."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**case, **values}) + "\n")

    def left(self) -> float:
        """Seconds until the part must end."""
        return self.end - time.monotonic()

    def attempt(self, case: dict, work: Callable[[], dict]) -> bool:
        """Runs and keeps one case; an error is kept in its place, and costs no other case.

        Returns:
            Whether it went well.
        """
        if self.left() < PAUSE:
            self.add(case, error="not run: no time left")
            return False
        try:
            found = work()
        except Exception as error:
            self.add(case, error=first_line(error))
            return False
        self.add(case, **found)
        return True


def first_line(error: BaseException) -> str:
    """An error in one line of at most 300 characters."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def measure(call: Callable[[], object], wait: Callable[[object], None], seconds: float) -> dict:
    """Seconds of one call: median and least over windows of many calls each.

    The host runs ahead of the device inside a window, as a training loop does, and waits once at
    its end. One call has been made before, which compiles and loads.

    Args:
        call: starts the work.
        wait: returns when what ``call`` gave is there.
        seconds: to spend, about; three windows are always taken unless a call alone takes longer,
            which is then the one measurement.
    """
    start = time.perf_counter()
    wait(call())
    first = time.perf_counter() - start
    calls = max(1, math.ceil(WINDOW_S / max(first, 1e-6)))
    calls = min(calls, 200)
    windows = min(MOST_WINDOWS, max(LEAST_WINDOWS, int(seconds / max(first * calls, 1e-6))))
    found = [first] if first > seconds else []  # so long that once must do
    windows = 0 if found else windows
    for _ in range(windows):
        start = time.perf_counter()
        for _ in range(calls):
            result = call()
        wait(result)
        found.append((time.perf_counter() - start) / calls)
    return {
        "seconds": statistics.median(found),
        "least_seconds": min(found),
        "windows": len(found),
        "calls": calls if windows else 1,
    }


def rows_for(case: dict, memory: float) -> int:
    """The rows of a case, halved on a card of under 100 GB: those named are an H200's."""
    return case["batch"] if memory > 100e9 or case["batch"] < 2 else case["batch"] // 2


def spare_compile_threads() -> int:
    """Programs compiled side by side."""
    return max(1, min(8, (os.cpu_count() or 2) // 2))
