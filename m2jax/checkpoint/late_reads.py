# SPDX-License-Identifier: Apache-2.0
"""What Orbax leaves behind when the read of a checkpoint fails."""

from __future__ import annotations

import functools
import sys
from pathlib import Path


@functools.cache
def silence_late_reads() -> None:
    """Lets reads end unheard that Orbax leaves behind when the read of another array failed.

    They end when their event loop is closed, in threads of their own and at no time one could wait
    for; Python would print a traceback for each.
    """
    before = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        closed = repr(unraisable.exc_value) == "RuntimeError('Event loop is closed')"
        code = getattr(unraisable.object, "cr_code", None)  # of a coroutine
        if not (closed or (code is not None and "orbax" in Path(code.co_filename).parts)):
            before(unraisable)

    sys.unraisablehook = hook
