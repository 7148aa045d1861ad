# SPDX-License-Identifier: Apache-2.0
"""Features and what stands beside them, from .npz files that may come from anywhere."""

from __future__ import annotations

import struct
import tokenize
import zipfile
import zlib
from pathlib import Path

import numpy as np

from m2jax.config import UserError

# What NumPy and zipfile raise on a file that is cut, changed, or another: not one of a kind.
_DAMAGED = (
    *(OSError, ValueError, EOFError, KeyError, TypeError, AttributeError, IndexError),
    *(NotImplementedError, RuntimeError, MemoryError, OverflowError, SyntaxError),
    *(zipfile.BadZipFile, zlib.error, tokenize.TokenError, struct.error),
)


def read(file: Path, beside: str, advice: str) -> tuple[np.ndarray, np.ndarray]:
    """The arrays ``features`` and ``beside`` of a file; their shapes are the caller's to check.

    Args:
        file: an .npz.
        beside: name of the other array.
        advice: what to do when the file is none; ends the message.

    Raises:
        UserError: missing, damaged, holding objects, or without one of the two.
    """
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as held:
            return held["features"], held[beside]
    except _DAMAGED as error:
        why = str(error) or type(error).__name__
        raise UserError(f"{file}: no features and {beside} in it ({why:.120}): {advice}") from error
