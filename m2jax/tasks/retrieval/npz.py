# SPDX-License-Identifier: Apache-2.0
"""Features and what stands beside them, from .npz files that may come from anywhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from m2jax.config import UserError
from m2jax.data import npz


def read(file: Path, beside: str, advice: str) -> tuple[np.ndarray, np.ndarray]:
    """The arrays ``features`` and ``beside`` of a file; their shapes are the caller's to check.

    Args:
        file: an .npz.
        beside: name of the other array.
        advice: what to do when the file is none; ends the message.

    Raises:
        UserError: missing, damaged, holding objects, claiming more than it holds, or without one
            of the two.
    """
    try:
        held = npz.read(file, "features", beside)
    except npz.DAMAGED as error:
        why = npz.reason(error)
        raise UserError(f"{file}: no features and {beside} in it ({why}): {advice}") from error
    return held["features"], held[beside]
