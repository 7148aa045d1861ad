# SPDX-License-Identifier: Apache-2.0
"""Where data that m2jax makes lies on this machine."""

from __future__ import annotations

import os
from pathlib import Path


def data_home(data_dir: str = "") -> Path:
    """``data_dir`` where it is given, else $M2JAX_DATA, else ~/.cache/m2jax."""
    return Path(data_dir or os.environ.get("M2JAX_DATA") or "~/.cache/m2jax").expanduser()
