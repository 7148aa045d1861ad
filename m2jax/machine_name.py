# SPDX-License-Identifier: Apache-2.0
"""Machines by name: ``v5p:4x4x8``, ``2*v6e:16x16`` (two slices), ``h100:32x8`` (hosts x GPUs)."""

from __future__ import annotations

import re
from typing import NamedTuple

_FORM = re.compile(r"(?:(\d+)\*)?([a-z0-9]+):(\d+(?:x\d+)*)")


class MachineName(NamedTuple):
    """The parts of a name; whether such a machine exists is another matter."""

    slices: int | None  # None: not said, which is one
    kind: str  # "v5p"
    sizes: tuple[int, ...]  # (4, 4, 8)

    @property
    def shape(self) -> str:
        """``4x4x8``."""
        return "x".join(map(str, self.sizes))


def split(name: str) -> MachineName | None:
    """The parts of ``[N*]TYPE:SHAPE``; ``None`` where the name has another form or a size of 0."""
    match = _FORM.fullmatch(name)
    if not match:
        return None
    slices = int(match[1]) if match[1] else None
    sizes = tuple(int(size) for size in match[3].split("x"))
    return None if slices == 0 or 0 in sizes else MachineName(slices, match[2], sizes)
