# SPDX-License-Identifier: Apache-2.0
"""Files of ``torch.save`` without torch: a zip of one pickle and one member per storage.

Members are stored, not compressed, so a tensor is a view of the mapped file. The pickle runs in
``torch_pickle``, which knows tensors and plain containers alone.
"""

from __future__ import annotations

import mmap
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from m2jax.checkpoint.convert import torch_pickle
from m2jax.config import UserError

PICKLE_LIMIT = 8 * 2**20  # bytes of the pickle; that of a 10B model has 0.2 MB
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of name and extra field


class Member(NamedTuple):
    """Where the bytes of a stored member lie in the file."""

    begin: int
    size: int


def read(file: Path, mapped: mmap.mmap) -> Mapping[str, Any]:
    """The object that was saved, tensors as views of ``mapped``.

    Raises:
        UserError: truncated, damaged, not of ``torch.save``, or asking for more than tensors.
    """
    members = _members(file, mapped)
    pickles = [name for name in members if name.endswith("data.pkl")]
    if pickles != ["data.pkl"]:
        raise UserError(f"{file}: a zip without torch's data.pkl: name a file of torch.save")
    place = members["data.pkl"]
    if place.size > PICKLE_LIMIT:
        raise UserError(f"{file}: data.pkl has {place.size:,} bytes: no honest checkpoint does")
    order = members.get("byteorder")
    big = order is not None and mapped[order.begin : order.begin + order.size] == b"big"
    storages = {n.removeprefix("data/"): m for n, m in members.items() if n.startswith("data/")}
    pickled = mapped[place.begin : place.begin + place.size]
    content = torch_pickle.load(str(file), pickled, mapped, storages, big_endian=big)
    if not isinstance(content, dict):
        raise UserError(f"{file}: holds a {type(content).__name__}, no names: save a state_dict")
    return content


def _members(file: Path, mapped: mmap.mmap) -> dict[str, Member]:
    """Every member by its name inside the archive's one folder."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise UserError(f"{file}: truncated or damaged ({error}): fetch it again") from None
    found: dict[str, Member] = {}
    for entry in entries:
        path = PurePosixPath(entry.filename)
        if path.is_absolute() or ".." in path.parts or "\\" in entry.filename or entry.is_dir():
            raise UserError(f"{file}: member {entry.filename!r} is no torch file's: do not use it")
        name = "/".join(path.parts[1:])
        if name.startswith("code/"):
            raise UserError(
                f"{file}: a TorchScript program, as OpenAI's own files are: take its state_dict, "
                "or the model's transformers or open_clip release"
            )
        if name in found:
            raise UserError(f"{file}: member {name!r} is there twice: do not use this file")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise UserError(
                f"{file}: member {name!r} is compressed or encrypted, which torch never does: "
                "unpack it and zip it without compression"
            )
        found[name] = _place(file, mapped, entry)
    return found


def _place(file: Path, mapped: mmap.mmap, entry: zipfile.ZipInfo) -> Member:
    """The bytes of a member, behind its local header."""
    start = entry.header_offset
    head = mapped[start : start + _LOCAL_HEADER.size]
    if len(head) == _LOCAL_HEADER.size:
        signature, name, extra = _LOCAL_HEADER.unpack(head)
        begin = start + _LOCAL_HEADER.size + name + extra
        if signature == b"PK\x03\x04" and begin + entry.file_size <= len(mapped):
            return Member(begin, entry.file_size)
    raise UserError(f"{file}: member {entry.filename!r} is truncated: fetch it again")
