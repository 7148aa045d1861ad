# SPDX-License-Identifier: Apache-2.0
"""Output files of the commands: whole or not there at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from m2jax.config import UserError


def check_parent(path: Path, flag: str) -> None:
    """Refuses an output path that cannot be written, before any long work is done for it.

    Raises:
        UserError: the folder is missing or not writable, or the path is a folder.
    """
    if path.is_dir():
        raise UserError(f"{flag} {path}: is a folder: name a file in it")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{flag} {path}: no such folder {path.absolute().parent}: make it first")
    if not os.access(path.absolute().parent, os.W_OK):
        raise UserError(f"{flag} {path}: cannot write there: choose another folder")


def check_outputs(out: Path, html: Path | None) -> None:
    """``check_parent`` of a verb's two outputs, which must be two files.

    Raises:
        UserError: as ``check_parent``, or one is the other.
    """
    check_parent(out, "--out")
    if html is not None:
        check_parent(html, "--html")
        if html.resolve() == out.resolve():
            raise UserError(f"--html {html}: is --out too: name two files")


def write(path: Path, fill: Callable[[IO[bytes]], Any]) -> None:
    """Writes a file through a temporary sibling, so that readers never see half of it."""
    handle, name = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            fill(file)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp makes private files
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
