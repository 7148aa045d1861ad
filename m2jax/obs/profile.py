# SPDX-License-Identifier: Apache-2.0
"""A trace of some steps, on request; read it with ``xprof``, TensorBoard or ui.perfetto.dev."""

from __future__ import annotations

import re
from pathlib import Path

import jax

from m2jax.config import UserError


class Profiler:
    """Traces steps A to B-1 of ``log.profile="A:B"`` into WORKDIR/profile.

    Args:
        spec: "A:B", counting steps from 0; "" traces nothing.
        workdir: the run's folder.

    Raises:
        UserError: a spec that names no steps.
    """

    def __init__(self, spec: str, workdir: Path) -> None:
        self._folder, self._running = workdir / "profile", False
        self._begin = self._end = -1
        if spec:
            found = re.fullmatch(r"(\d+):(\d+)", spec)
            if not found or int(found[1]) >= int(found[2]):
                raise UserError(f"log.profile={spec!r}: no steps: write A:B with A below B")
            self._begin, self._end = int(found[1]), int(found[2])

    def before(self, step: int) -> None:
        """Step number ``step`` is about to be dispatched."""
        if step == self._begin:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def after(self, step: int, result: object) -> None:
        """It was dispatched; ``result`` is what it will have computed."""
        if self._running and step + 1 == self._end:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Writes what was traced, if a trace is going on."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
