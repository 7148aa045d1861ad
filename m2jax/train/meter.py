# SPDX-License-Identifier: Apache-2.0
"""What the log says of a run beside its loss: speed, waiting, memory, skipped steps."""

from __future__ import annotations

from collections import Counter
from typing import Any

import jax

from m2jax.data.loader import Loader
from m2jax.data.source import SKIPPED
from m2jax.dist.topology import chip_of
from m2jax.obs.goodput import Goodput
from m2jax.obs.memory import memory
from m2jax.train.task import Metrics


class Meter:
    """Follows the loop; ``row`` sums up what happened since the last row.

    Args:
        loader: whose batches the loop takes.
        goodput: where time is booked.
        devices: of the whole run.
        step_flops: that the model needs for a step, over all devices; 0: not known.
        skipped: steps skipped by earlier processes of the run.
    """

    def __init__(
        self,
        loader: Loader,
        goodput: Goodput,
        devices: list[Any],
        *,
        step_flops: float = 0.0,
        skipped: int = 0,
    ) -> None:
        self.goodput = goodput
        self._loader, self._devices, self._flops = loader, devices, step_flops
        self._skipped = skipped
        self._last: Metrics | None = None
        self._pending: list[jax.Array] = []  # each step's count of skips in a row, not yet read
        self._seen: Counter[str] = Counter(loader.counts)
        self._booked: dict[str, float] = {}

    def fed(self) -> None:
        """A batch has come. Waiting for it cost something only if the devices had run dry.

        Whether they had is looked up now, so a wait that began before the last step ended counts
        whole: an upper bound.
        """
        idle = self._last is None or self._last["loss"].is_ready()  # pyright: ignore[reportAttributeAccessIssue]
        self.goodput.book("data" if idle else "step")

    def stepped(self, metrics: Metrics) -> None:
        """A step was dispatched; the first call compiles it."""
        self.goodput.book("compile" if self._last is None else "step")
        self._last = metrics
        self._pending.append(metrics["skipped"])

    def row(self, samples_per_s: float, steps_per_s: float) -> dict[str, float]:
        """Entries of the log; call it when the last step's metrics are there."""
        self.goodput.book("step")
        self._skipped += sum(int(count) > 0 for count in self._pending)
        self._pending.clear()
        local = [d for d in self._devices if d.process_index == jax.process_index()]
        row = {
            "skipped_total": float(self._skipped),
            "samples_per_s_per_chip": samples_per_s / len(self._devices),
            "goodput": self.goodput.share(),
            "data_wait": self._data_wait(),
            **memory(local),
            **self._rows_by_part(),
        }
        chip = chip_of(self._devices[0].device_kind)
        if chip and self._flops:
            peak = chip.peak_flops * len(self._devices)
            row["mfu"] = self._flops * steps_per_s / peak
        return row

    def _data_wait(self) -> float:
        """Share of the time since the last row that devices waited for a batch."""
        before, self._booked = self._booked, dict(self.goodput.seconds)
        spent = {kind: now - before.get(kind, 0.0) for kind, now in self._booked.items()}
        return spent.get("data", 0.0) / max(sum(spent.values()), 1e-9)

    def _rows_by_part(self) -> dict[str, float]:
        """Shares of the sources in the rows since the last row; unreadable rows so far."""
        counts = Counter(self._loader.counts)
        rows = {part: counts[part] - self._seen[part] for part in self._loader.parts}
        self._seen = counts
        found = {f"data/share/{part}": n / max(sum(rows.values()), 1) for part, n in rows.items()}
        if SKIPPED in counts:
            found["data/skipped"] = float(counts[SKIPPED])
        return found
