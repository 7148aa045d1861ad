# SPDX-License-Identifier: Apache-2.0
"""The pickle inside a torch file, read by an unpickler that knows tensors and containers alone.

A pickle is a program. This one may name the few things in ``_ALLOWED`` and nothing else: any other
name ends the reading before a single thing is called. What the allowed names give are objects
without attributes, so the pickle cannot change them either.
"""

from __future__ import annotations

import collections
import io
import mmap
import pickle
import pickletools
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import jax.numpy as jnp
import numpy as np

from m2jax.config import UserError

_STORAGES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}


class Damaged(Exception):
    """The pickle is of the right kind but its numbers make no sense."""


class StorageType(NamedTuple):
    """What ``torch.FloatStorage`` and its like stand for."""

    dtype: np.dtype


class Storage(NamedTuple):
    """A flat run of numbers in the mapped file."""

    dtype: np.dtype
    begin: int  # byte of the file
    numel: int


class _Tensor:
    """Stands for ``torch._utils._rebuild_tensor_v2``: a strided view of a storage."""

    __slots__ = ("_mapped",)

    def __init__(self, mapped: mmap.mmap) -> None:
        object.__setattr__(self, "_mapped", mapped)

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise Damaged("it changes what rebuilds tensors")

    def __call__(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> np.ndarray:
        numbers = (offset, *size, *stride)
        if not isinstance(storage, Storage) or not all(type(n) is int and n >= 0 for n in numbers):
            raise Damaged("a tensor is described by other things than a storage and whole numbers")
        if len(size) != len(stride):
            raise Damaged(f"a tensor has {len(size)} sizes and {len(stride)} strides")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if 0 not in size and last >= storage.numel:
            raise Damaged(f"a tensor of shape {list(size)} runs past the end of its storage")
        item = storage.dtype.itemsize
        begin = storage.begin + (0 if 0 in size else offset * item)
        strides = tuple(step * item for step in stride)
        return np.ndarray(size, storage.dtype, buffer=self._mapped, offset=begin, strides=strides)


class _Parameter:
    """Stands for ``torch._utils._rebuild_parameter``: the tensor itself."""

    __slots__ = ()

    def __call__(self, data: Any, *_: Any) -> Any:
        return data


def load(
    file: str,
    pickled: bytes,
    mapped: mmap.mmap,
    storages: Mapping[str, tuple[int, int]],
    *,
    big_endian: bool,
) -> Any:
    """Runs the pickle.

    Args:
        file: its name, for errors.
        pickled: the pickle.
        mapped: the file its storages lie in.
        storages: first byte and size in bytes of each storage, by key.
        big_endian: the byte order of the storages.

    Raises:
        UserError: it names anything but tensors and plain containers, or is damaged.
    """
    try:
        _scan(file, pickled)
        return _Unpickler(file, pickled, mapped, storages, big_endian).load()
    except UserError:
        raise
    except Exception as error:  # a hostile pickle can make the machine fail in any way it likes
        raise UserError(
            f"{file}: its pickle is damaged ({type(error).__name__}: {error}): fetch it again"
        ) from error


def _scan(file: str, pickled: bytes) -> None:
    """Refuses, before it runs, a pickle whose memo would take memory by its sheer index."""
    count, highest = 0, 0
    for opcode, argument, _ in pickletools.genops(pickled):
        count += 1
        if "PUT" in opcode.name:
            highest = max(highest, int(argument or 0))
        if opcode.name in ("GLOBAL", "INST"):
            module, _, name = str(argument).partition(" ")
            _check_name(file, module, name)
    if highest > count:
        raise Damaged(f"memo index {highest} in {count} steps")


def _check_name(file: str, module: str, name: str) -> None:
    """Refuses a name that stands for no tensor and no plain container."""
    storage = module == "torch" and name in _STORAGES
    if not storage and (module, name) not in _ALLOWED:
        raise UserError(
            f"{file}: asks for {module}.{name}, which is no tensor: save its state_dict alone"
        )


_ALLOWED = {
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
}


class _Unpickler(pickle.Unpickler):
    """An unpickler for which nothing exists but ``_ALLOWED`` and the storages of one file."""

    def __init__(self, file, pickled, mapped, storages, big_endian) -> None:
        super().__init__(io.BytesIO(pickled))
        self._file, self._mapped = file, mapped
        self._storages, self._big_endian = storages, big_endian

    def find_class(self, module: str, name: str) -> Any:
        _check_name(self._file, module, name)
        if name in _STORAGES:
            return StorageType(_STORAGES[name])
        return {
            "OrderedDict": collections.OrderedDict,
            "Size": tuple,
            "_rebuild_tensor_v2": _Tensor(self._mapped),
            "_rebuild_parameter": _Parameter(),
        }[name]

    def persistent_load(self, pid: Any) -> Storage:
        kind, storage_type, key, _, numel = pid
        if kind != "storage" or not isinstance(storage_type, StorageType) or type(numel) is not int:
            raise Damaged("it refers to something that is no storage")
        begin, size = self._storages[key]
        dtype = storage_type.dtype
        if numel < 0 or numel * dtype.itemsize > size:
            raise Damaged(f"storage {key} should hold {numel} numbers but has {size} bytes")
        if self._big_endian and dtype == jnp.bfloat16:
            raise UserError(f"{self._file}: bfloat16 in big-endian order: save it as float32")
        return Storage(dtype.newbyteorder(">") if self._big_endian else dtype, begin, numel)
