# SPDX-License-Identifier: Apache-2.0
"""Model folders on the Hugging Face Hub, through ``huggingface_hub`` where it is installed."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from m2jax.checkpoint.convert import weights
from m2jax.config import UserError

PREFIX = "hf:"
# Configs, tokenizers and an index of weights, or a checkpoint of ours. Here * stands for / too.
FIRST = ("*.json", "*.txt", "*.model", "bundle/*", "state/*", "checkpoints/*")
_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # no .. and nothing that begins with it
_REVISION = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*")


def is_hub(path: str | os.PathLike[str]) -> bool:
    """Whether a path means a repository of the Hub."""
    return str(path).startswith(PREFIX)


def download(path: str | os.PathLike[str]) -> Path:
    """Downloads ``hf:OWNER/NAME`` or ``hf:OWNER/NAME@REVISION``, or finds it in the Hub's cache.

    A release often holds the same weights several times, for several frameworks. Only those that
    ``weights.read`` would take are fetched, beside the small files.

    Raises:
        UserError: ``huggingface_hub`` is not installed, or the repository cannot be had.
    """
    name, _, revision = str(path).removeprefix(PREFIX).partition("@")
    if not _NAME.fullmatch(name) or not _REVISION.fullmatch(revision or "main"):
        raise UserError(f"{path}: not the name of a repository: write hf:OWNER/NAME")
    directory = _fetch(path, name, revision, allow_patterns=[*FIRST])
    if any((directory / part).is_dir() for part in ("bundle", "checkpoints")):
        return directory
    commit = directory.name  # so the cache calls a snapshot; all files are to be of one
    for pattern in (*weights.STANDARD, *(f"*{suffix}" for suffix in weights.SUFFIXES)):
        _fetch(path, name, commit, allow_patterns=[pattern], ignore_patterns=["*/*"])
        if any(directory.glob(pattern)):
            break
    return directory


def _fetch(path: str | os.PathLike[str], name: str, revision: str, **patterns: Any) -> Path:
    """The snapshot of a repository, with at least the files of these patterns."""
    try:
        import huggingface_hub  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(f"{path}: needs huggingface_hub: pip install huggingface_hub") from None
    try:
        where = huggingface_hub.snapshot_download(name, revision=revision or None, **patterns)
        return Path(where)
    except Exception as error:  # its errors have no common base: HTTP, cache, names, disk
        reason = str(error).strip().splitlines()
        raise UserError(
            f"{path}: cannot be downloaded ({type(error).__name__}: {' '.join(reason[:1])}): "
            "check the name and the connection"
        ) from error
