# SPDX-License-Identifier: Apache-2.0
"""Ends a run that hangs, with the evidence on standard error, instead of holding its devices idle.

A process that waits for a peer which died, a collective whose participants disagree, a file system
that stopped answering: none of these raises anything.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
from types import TracebackType

EXIT_CODE = 43
FIRST = 4  # the first step compiles: it may take this many times as long
TICKS = 20  # looks per allowed time


class Watchdog:
    """Ends the process when no ``beat`` comes for ``stall_s`` seconds, until the block is left.

    Time is counted in its own sleeps, not by a clock: a process that was stopped (Ctrl-Z, a laptop
    that slept) has not stalled. It needs Python's lock, so a hang inside a C function that holds it
    is not seen.

    Args:
        stall_s: seconds between beats that mean a stall; 0 never ends anything.
    """

    def __init__(self, stall_s: float) -> None:
        self._stall_s = stall_s
        self._step = -1
        self._ticks = 0
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="m2jax-watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._stall_s > 0:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._left.set()
        if self._thread.is_alive():
            self._thread.join()

    def beat(self, step: int) -> None:
        """Step ``step`` was begun or ended: the run is alive."""
        self._step, self._ticks = step, 0

    def _watch(self) -> None:
        while not self._left.wait(self._stall_s / TICKS):
            self._ticks += 1
            if self._ticks > TICKS * (FIRST if self._step < 0 else 1):
                self._end()

    def _end(self) -> None:
        where = "before the first step" if self._step < 0 else f"after step {self._step}"
        seconds = self._ticks / TICKS * self._stall_s
        print(
            f"m2jax: error: {where}: nothing happened for {seconds:g} s (train.stall_s); "
            "the stack of every thread follows",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        sys.stderr.flush()
        os._exit(EXIT_CODE)  # exit handlers would wait for the peers that do not answer
