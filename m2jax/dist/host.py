# SPDX-License-Identifier: Apache-2.0
"""What the host's memory allocator must be told before a process starts."""

from __future__ import annotations

import os
import sys

TUNABLE = "GLIBC_TUNABLES"
HUGE_PAGES = "glibc.malloc.hugetlb=1"  # malloc asks for transparent huge pages (glibc >= 2.35)


def restart_with_huge_pages() -> None:
    """Starts this process again, once, with huge pages for malloc.

    XLA on the CPU allocates the step's temporaries anew each time, so every step touches hundreds of
    megabytes of fresh pages; with 4 kB pages the faults took 40 % of the demo's step
    (benchmarks/step.md). Does nothing off Linux, or where the user set the tunable.
    """
    if sys.platform == "linux" and TUNABLE not in os.environ:
        environ = {**os.environ, TUNABLE: HUGE_PAGES}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environ)
