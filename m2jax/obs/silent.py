# SPDX-License-Identifier: Apache-2.0
"""What the processes of a run other than the first write and print: nothing."""

from __future__ import annotations

from collections.abc import Mapping


class SilentWriter:
    """A metric writer that keeps nothing; the first process writes the same numbers."""

    seconds = 0.0

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Drops a row."""

    def close(self) -> None:
        """Has nothing to close."""


class SilentProgress:
    """A progress line that nobody sees."""

    def show(self, step: int, loss: float, samples_per_s: float) -> None:
        """Shows nothing."""

    def note(self, text: str) -> None:
        """Says nothing."""
