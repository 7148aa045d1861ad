# SPDX-License-Identifier: Apache-2.0
"""safetensors files: read as views of the mapped file, written one tensor at a time."""

from __future__ import annotations

import json
import math
import mmap
import struct
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from m2jax.config import UserError

DTYPES: Mapping[str, np.dtype] = types.MappingProxyType(
    {
        "F64": np.dtype(np.float64),
        "F32": np.dtype(np.float32),
        "F16": np.dtype(np.float16),
        "BF16": np.dtype(jnp.bfloat16),
        "I64": np.dtype(np.int64),
        "I32": np.dtype(np.int32),
        "I16": np.dtype(np.int16),
        "I8": np.dtype(np.int8),
        "U8": np.dtype(np.uint8),
        "BOOL": np.dtype(np.bool_),
    }
)


def read(file: Path, mapped: mmap.mmap) -> dict[str, np.ndarray]:
    """Views of the tensors, after the safetensors library has found the file sound.

    Raises:
        UserError: truncated, damaged, or of a type that no array here has.
    """
    try:
        with safe_open(file, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file}: truncated or damaged ({reason}): fetch it again") from None
    (length,) = struct.unpack("<Q", mapped[:8])
    header = json.loads(mapped[8 : 8 + length])
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        dtype = DTYPES.get(entry["dtype"])
        if dtype is None:
            raise UserError(f"{file}: {name} is of type {entry['dtype']}: convert it to F32 first")
        begin = 8 + length + entry["data_offsets"][0]
        try:
            found[name] = np.ndarray(tuple(entry["shape"]), dtype, buffer=mapped, offset=begin)
        except (ValueError, OverflowError) as error:  # too many axes, or 0 times too much
            raise UserError(f"{file}: {name}: no such shape ({error}): fetch it again") from None
    return found


def write(
    handle: IO[bytes],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: np.dtype,
    tensor: Callable[[str], np.ndarray],
) -> None:
    """Writes a file of tensors of one dtype.

    Args:
        handle: open for writing.
        shapes: of every tensor, in the order they are written.
        dtype: of all of them.
        tensor: makes one by its name; at any time one of them is in memory.
    """
    code = next(code for code, known in DTYPES.items() if known == dtype)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begins aligned
    handle.write(struct.pack("<Q", len(text)) + text)
    for name, shape in shapes.items():
        array = np.asarray(tensor(name), dtype, order="C")
        assert array.shape == shape, name
        handle.write(array.reshape(-1).view(np.uint8).data)
