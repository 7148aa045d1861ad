# SPDX-License-Identifier: Apache-2.0
"""How much memory a process and its devices have used."""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from typing import Any


def memory(devices: Sequence[Any]) -> dict[str, float]:
    """Bytes: the fullest device's peak where devices count, and always the peak of the process.

    Args:
        devices: jax devices of this process.
    """
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    found = {"memory/host_peak": float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)}
    stats = [device.memory_stats() for device in devices]
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    if peaks:
        found["memory/device_peak"] = float(max(peaks))
    return found
