# SPDX-License-Identifier: Apache-2.0
"""Weight files as named arrays that take no memory: views of the mapped file.

The format is told by the file's first bytes, never by its name. Files are hostile until checked: no
reader here runs anything a file asks for.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from m2jax.checkpoint.convert import safetensors_file, torch_zip
from m2jax.config import UserError

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")  # looked for in a folder, in this order

STANDARD = (  # names that transformers and open_clip look for, and in which order
    "model.safetensors",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)

INDEX = "model.safetensors.index.json"  # of transformers' releases in several files


class Weights(NamedTuple):
    """What a weight file holds."""

    file: Path
    content: Mapping[str, Any]  # arrays by name, or the nested containers of a torch file


def find(source: Path) -> Path:
    """The weight file that ``source`` names.

    That is ``source`` itself, or in a folder one of a standard name, else the only one of its kind.

    Raises:
        UserError: there is none, or several.
    """
    if source.is_file():
        return source
    if not source.is_dir():
        raise UserError(f"{source}: no such file: name a checkpoint or a folder that holds one")
    for name in STANDARD:
        if (source / name).is_file():
            return source / name
    for suffix in SUFFIXES:
        found = sorted(source.glob(f"*{suffix}"))
        if len(found) > 1:
            names = ", ".join(p.name for p in found[:4])
            raise UserError(f"{source}: holds several weight files ({names}): name one of them")
        if found:
            return found[0]
    raise UserError(f"{source}: holds no weight file ({', '.join(SUFFIXES)}): name another folder")


def read(source: Path) -> Weights:
    """Opens the weight file that ``source`` names, or the several of an index in that folder.

    Raises:
        UserError: no weight file, of an unknown kind, truncated, damaged, or asking for more than
            tensors and plain containers.
    """
    index = source / INDEX
    if index.is_file() and not any((source / name).is_file() for name in STANDARD):
        content: dict[str, Any] = {}
        for name in _files(index):
            part = read(source / name)
            twice = sorted(map(str, content.keys() & part.content.keys()))
            if twice:
                raise UserError(f"{part.file}: {twice[0]} is in another file too: fetch both again")
            content |= part.content
        return Weights(index, content)
    file = find(source)
    try:
        with file.open("rb") as handle:
            mapped = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        reason = getattr(error, "strerror", None) or "is empty"
        raise UserError(f"{file}: cannot be read ({reason}): check the path") from None
    head = mapped[:9]
    if head[:4] == b"PK\x03\x04":
        return Weights(file, torch_zip.read(file, mapped))
    if head[8:9] == b"{":
        return Weights(file, safetensors_file.read(file, mapped))
    if head[:1] == b"\x80":
        raise UserError(
            f"{file}: a torch file of before version 1.6: load it with torch and save it again"
        )
    raise UserError(f"{file}: neither a safetensors nor a torch file: name a checkpoint")


def _files(index: Path) -> list[str]:
    """The files an index names, all of them beside it.

    Raises:
        UserError: no index, or it names a file elsewhere.
    """
    try:
        names = sorted({*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{index}: no index of weight files: fetch it again") from None
    for name in names:
        if not str(name).endswith(".safetensors") or name != Path(str(name)).name:
            raise UserError(f"{index}: names {name!r}, no weight file beside it: do not use it")
    return names
