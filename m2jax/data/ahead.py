# SPDX-License-Identifier: Apache-2.0
"""Work done ahead in threads, in order: Grain's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import grain

T = TypeVar("T")


def ahead(count: int, work: Callable[[int], T], *, threads: int, buffer: int) -> Iterator[T]:
    """``work(0)``, ``work(1)`` ... in order, up to ``buffer`` of them ahead of who asks.

    Args:
        count: how many.
        work: called in threads.
        threads: how many of them; 0: none, each when it is asked for.
        buffer: results kept ready.
    """
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffer)
    yield from grain.MapDataset.range(count).map(lambda i: work(int(i))).to_iter_dataset(options)
