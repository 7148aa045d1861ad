# SPDX-License-Identifier: Apache-2.0
"""The JSON files beside weights: absent, or one object; a damaged one is never taken for absent."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m2jax.config import UserError
from m2jax.data import hf_text


def read(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no such file.

    Raises:
        UserError: it cannot be read or holds no JSON object.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(hf_text.read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}): take an undamaged copy") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds no JSON object: take an undamaged copy")
    return value


def write(file: Path, values: Mapping[str, Any]) -> None:
    """Writes one JSON object."""
    file.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
