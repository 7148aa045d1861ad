# SPDX-License-Identifier: Apache-2.0
"""Fixtures are found by what they hold, never by a list of names.

They lie in ``$M2JAX_GOLDEN/AREA`` (``tests/golden`` if unset). A *kind* is recognised by the keys
of a file; a kind that the folder lacks is skipped by its name, and other files are ignored. Data
that is not ours to copy lies in ``$M2JAX_SHARED``, or in ``shared`` beside the repository.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

HERE = Path(__file__).parent
GOLDEN = Path(os.environ.get("M2JAX_GOLDEN", HERE))
SHARED = Path(os.environ.get("M2JAX_SHARED", HERE.parent.parent.parent / "shared"))


def cases(
    area: str, kind: str, recognise: Callable[[Path], bool], root: Path | None = None
) -> list[Any]:
    """The files of one kind as parameters of a test, or one that skips by the kind's name."""
    folder = (root or GOLDEN) / area
    files = sorted(p for p in folder.iterdir() if p.is_file()) if folder.is_dir() else []
    found = [pytest.param(file, id=file.stem) for file in files if recognise(file)]
    skip = pytest.mark.skip(reason=f"{folder} holds no {kind}")
    return found or [pytest.param(None, id=kind.replace(" ", "-"), marks=skip)]


def arrays(file: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file; none of any other."""
    if file.suffix != ".npz":
        return {}
    with np.load(file) as loaded:
        return dict(loaded)


def keys(file: Path) -> set[str]:
    """Names of the arrays of an .npz file; none of any other."""
    if file.suffix != ".npz":
        return set()
    with np.load(file) as loaded:
        return set(loaded.files)


def values(file: Path) -> Any:
    """What a .json file holds; ``None`` of any other."""
    return json.loads(file.read_text(encoding="utf-8")) if file.suffix == ".json" else None


def shared(path: str) -> Path:
    """A file that is not ours to copy; skips the test by its name where it is not there."""
    file = SHARED / path
    if not file.exists():
        pytest.skip(f"{path} is not in {SHARED.name}/ beside the repository (or $M2JAX_SHARED)")
    return file
