# SPDX-License-Identifier: Apache-2.0
"""``m2jax convert export``: a model of ours in somebody else's format, as a folder.

Each format is one module with a ``write(directory, model)`` that fills an empty folder.
"""

from __future__ import annotations

import importlib
import os
import shutil
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from m2jax.checkpoint import folder
from m2jax.config import UserError
from m2jax.data.image import Preprocess
from m2jax.data.text import Tokenizer
from m2jax.models.params import Params

# Format -> the module that writes it.
FORMATS: Mapping[str, str] = types.MappingProxyType(
    {
        "m2-torch": "m2jax.checkpoint.convert.m2_outward",
        "hf": "m2jax.checkpoint.convert.hf_outward",
        "open-clip": "m2jax.checkpoint.convert.open_clip_outward",
    }
)


@runtime_checkable
class Model(Protocol):
    """What there is to export: a ``Bundle``."""

    @property
    def config(self) -> Any:
        """Resolved sizes."""
        ...

    @property
    def params(self) -> Params:
        """The parameters, wherever they lie."""
        ...

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, if it has one."""
        ...

    @property
    def preprocessing(self) -> Preprocess:
        """What images go through."""
        ...


def check(directory: Path, *, format: str) -> None:
    """Refuses a format or a destination that cannot be.

    Raises:
        UserError: an unknown format, or a folder that exists or cannot be made.
    """
    if format not in FORMATS:
        raise UserError(f"--format {format}: no such format: use one of {', '.join(FORMATS)}")
    folder.check_absent(directory)


def export(model: Model, path: str | os.PathLike[str], *, format: str = "m2-torch") -> None:
    """Writes a model in another format.

    Args:
        model: what ``load`` returned.
        path: the folder to make; it is complete or absent.
        format: m2-torch (the official M2-Encoder names), hf (transformers) or open-clip (open_clip;
            for Chinese-CLIP the authors' cn_clip); safetensors all.

    Raises:
        UserError: an unknown format, a model that it cannot hold, or a folder that exists.
    """
    directory = Path(path)
    check(directory, format=format)
    module = importlib.import_module(FORMATS[format])
    temporary = directory.absolute().with_name(f".{directory.name}.{os.getpid()}")
    try:
        temporary.mkdir()
        module.write(temporary, model)
        temporary.rename(directory)
    except OSError as error:
        raise UserError(
            f"{directory}: cannot be written ({error.strerror}): make room, or name a folder you "
            "may write to"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
