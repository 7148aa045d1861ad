# SPDX-License-Identifier: Apache-2.0
"""Arrays of .npy and .npz files that may come from anywhere, bounded by what the files can hold.

Headers and the archive's table are claims: NumPy allocates what a header names before it reads a
byte of it, and multiplies its shape in 64 bits. So claims are compared with each other and with
the size of the file first.
"""

from __future__ import annotations

import math
import os
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy

# NumPy and zipfile on a file that is cut, changed, or another: not of one kind.
DAMAGED = (
    *(OSError, ValueError, EOFError, KeyError, TypeError, AttributeError, IndexError),
    *(NotImplementedError, RuntimeError, MemoryError, OverflowError, SyntaxError),
    *(zipfile.BadZipFile, zlib.error, tokenize.TokenError, struct.error),
)
HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
# Bytes out of one byte, at most, of the two methods that NumPy writes (zlib's documentation).
GROWTH = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: 1032}
# What an archive may unpack to: so many bytes, or so many times its size if that is more. Features
# hardly shrink; names, of four bytes a letter and padded to the longest, do by tens.
UNPACKED_BYTES = 2**30
UNPACKED_TIMES = 64


def read(file: Path, *names: str) -> dict[str, np.ndarray]:
    """Arrays of an .npz by name.

    Args:
        file: the archive.
        names: of the arrays; none: all.

    Raises:
        DAMAGED: one of these: it is missing, cut, changed, no archive, holds objects, lacks a name,
            or claims more than it can hold or than ``UNPACKED_BYTES`` and ``UNPACKED_TIMES`` allow.
    """
    with file.open("rb") as opened, zipfile.ZipFile(opened) as packed:
        size = os.fstat(opened.fileno()).st_size
        members = [packed.getinfo(f"{name}.npy") for name in names] or packed.infolist()
        for member in members:
            _check_member(member, size)
        most = max(UNPACKED_BYTES, UNPACKED_TIMES * size)
        if sum(member.file_size for member in members) > most:
            raise ValueError(f"unpacks to over {most:,} bytes")
        found = {}
        for member in members:
            with packed.open(member) as stream:
                found[member.filename.removesuffix(".npy")] = read_npy(stream, member.file_size)
        return found


def read_npy(stream: IO[bytes], size: int) -> np.ndarray:
    """The array of an .npy.

    Args:
        stream: at its beginning, and seekable.
        size: bytes in it.

    Raises:
        DAMAGED: one of these: it is cut, changed, no .npy, holds objects, or its header claims
            another number of bytes than follow.
    """
    version = npy.read_magic(stream)
    if version not in HEADERS:
        raise ValueError(f"an .npy of version {version}")
    shape, _, dtype = HEADERS[version](stream)
    if dtype.hasobject:
        raise ValueError(f"holds Python objects ({dtype!s:.40})")
    left = size - stream.tell()
    # Elements of no bytes could be any number of them.
    sound = dtype.itemsize > 0 and min(shape, default=0) >= 0
    if not sound or math.prod(shape) * dtype.itemsize != left:
        raise ValueError(f"claims {dtype!s:.40} of shape {shape!s:.60} in {left:,} bytes")
    stream.seek(0)
    return npy.read_array(stream, allow_pickle=False)


def reason(error: BaseException) -> str:
    """What an error says, in a short line; NumPy's quote headers and have several."""
    said = str(error).strip() or type(error).__name__
    return said.splitlines()[0][:120]


def _check_member(member: zipfile.ZipInfo, size: int) -> None:
    """Refuses what the archive's table, which says how much to read, cannot be right about."""
    if member.compress_type not in GROWTH:
        raise ValueError(f"{member.filename:.80}: packed by a method that NumPy does not write")
    packed = min(member.compress_size, size)
    if member.file_size > GROWTH[member.compress_type] * packed:
        raise ValueError(
            f"{member.filename:.80}: claims {member.file_size:,} bytes out of {packed:,}"
        )
