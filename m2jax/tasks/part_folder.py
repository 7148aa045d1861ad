# SPDX-License-Identifier: Apache-2.0
"""What is trained beside a backbone, as a folder: a JSON card and tensors; no code in either."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from m2jax.checkpoint.folder import check_absent
from m2jax.config import UserError

CARD_BYTES = 2**27


class Layout(NamedTuple):
    """How one kind of folder is written."""

    name: str  # of its files, NAME.json and NAME.safetensors
    maker: str  # the command that makes it
    version: int = 1  # of the card

    @property
    def card(self) -> str:
        """The file of the card."""
        return f"{self.name}.json"

    @property
    def weights(self) -> str:
        """The file of the tensors."""
        return f"{self.name}.safetensors"


def write(
    directory: Path,
    layout: Layout,
    card: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
) -> None:
    """Makes the folder, whole or not at all.

    Raises:
        UserError: it exists or cannot be made.
    """
    check_absent(directory)
    parent = directory.absolute().parent
    temporary = Path(tempfile.mkdtemp(dir=parent, prefix=f".{directory.name}."))
    try:
        save_file(dict(tensors), temporary / layout.weights)
        text = json.dumps({"format": layout.version, **card}, ensure_ascii=False, indent=1) + "\n"
        (temporary / layout.card).write_text(text, encoding="utf-8")
        temporary.chmod(0o755)
        os.rename(temporary, directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def read(directory: Path, layout: Layout) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Card and tensors of a folder that may come from anywhere.

    Raises:
        UserError: no such folder, damaged, or another format.
    """
    file = directory / layout.card
    try:
        if file.stat().st_size > CARD_BYTES:
            raise UserError(f"{file}: over {CARD_BYTES:,} bytes: name a folder of {layout.maker}")
        card = json.loads(file.read_text(encoding="utf-8"))
        tensors = load_file(directory / layout.weights)
    except OSError as error:
        raise UserError(
            f"{directory}: {error.strerror or error}: name a folder made by {layout.maker}"
        ) from error
    except (ValueError, RecursionError, SafetensorError, AttributeError, KeyError) as error:
        # The last two: a number format that numpy has no name for.
        raise UserError(f"{directory}: damaged ({error}): copy it again") from error
    if not isinstance(card, dict) or card.get("format") != layout.version:
        raise UserError(f"{file}: another format: use the m2jax that made it")
    return card, tensors
