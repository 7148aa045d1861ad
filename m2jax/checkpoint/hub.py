# SPDX-License-Identifier: Apache-2.0
"""Model folders on the Hugging Face Hub, through ``huggingface_hub`` where it is installed."""

from __future__ import annotations

import os
import re
from pathlib import Path

from m2jax.config import UserError

PREFIX = "hf:"
_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # no .. and nothing that begins with it
_REVISION = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*")


def is_hub(path: str | os.PathLike[str]) -> bool:
    """Whether a path means a repository of the Hub."""
    return str(path).startswith(PREFIX)


def download(path: str | os.PathLike[str]) -> Path:
    """Downloads ``hf:OWNER/NAME`` or ``hf:OWNER/NAME@REVISION``, or finds it in the Hub's cache.

    Raises:
        UserError: ``huggingface_hub`` is not installed, or the repository cannot be had.
    """
    name, _, revision = str(path).removeprefix(PREFIX).partition("@")
    if not _NAME.fullmatch(name) or not _REVISION.fullmatch(revision or "main"):
        raise UserError(f"{path}: not the name of a repository: write hf:OWNER/NAME")
    try:
        import huggingface_hub  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(f"{path}: needs huggingface_hub: pip install huggingface_hub") from None
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision or None))
    except Exception as error:  # its errors have no common base: HTTP, cache, names, disk
        reason = str(error).strip().splitlines()
        raise UserError(
            f"{path}: cannot be downloaded ({type(error).__name__}: {' '.join(reason[:1])}): "
            "check the name and the connection"
        ) from error
