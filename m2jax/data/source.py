# SPDX-License-Identifier: Apache-2.0
"""What a data set is to the loader. Imports no jax: worker processes load this module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

HostBatch = Mapping[str, np.ndarray]

# Entries of a batch that are for the log alone and never reach a device; both may be missing.
PART = "part"  # int [n]: index into ``parts`` of the source
SKIPPED = "skipped"  # int [n]: unreadable rows passed over before this one


@runtime_checkable  # the tests check types as they run
class Source(Protocol):
    """A data set as random-access batches; one with sources to tell apart has ``parts`` too.

    One whose batches of n rows are every n of one endless order says so with ``by_place``: a run
    may go on there with another batch size.
    """

    assets: dict[str, Any]  # tokenizer and preprocessing, as checkpoints keep them

    def batch(self, index: int, rows: slice) -> HostBatch:
        """Rows of batch ``index``: the same whatever was asked before."""
        ...


class Rows:
    """A process's share of every batch; can be sent to worker processes."""

    def __init__(self, source: Source, rows: slice) -> None:
        self._source, self._rows = source, rows

    def __call__(self, index: int) -> HostBatch:
        """The share of batch ``index``."""
        return self._source.batch(int(index), self._rows)
