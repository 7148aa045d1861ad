# SPDX-License-Identifier: Apache-2.0
"""The pickle inside a torch file, read by an unpickler that knows tensors and containers alone.

A pickle is a program. This one may name the few things in ``_ALLOWED`` and nothing else: any other
name ends the reading before a single thing is called. What the allowed names give are objects
without attributes, so the pickle cannot change them either.
"""

from __future__ import annotations

import io
import math
import mmap
import pickle
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import jax.numpy as jnp
import numpy as np

from m2jax.checkpoint.convert.pickle_scan import Damaged, scan
from m2jax.config import UserError

SHARED = 8  # tensors may be this many times the file; tied weights are at most a few

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

    __slots__ = ("_bytes", "_mapped")

    def __init__(self, mapped: mmap.mmap) -> None:
        object.__setattr__(self, "_mapped", mapped)
        object.__setattr__(self, "_bytes", [0])  # of all tensors so far

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise Damaged("it changes what rebuilds tensors")

    def __call__(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> np.ndarray:
        if not isinstance(size, tuple | list) or not isinstance(stride, tuple | list):
            raise Damaged("a tensor's shape is no list of numbers")
        numbers = (offset, *size, *stride)
        if not isinstance(storage, Storage) or not all(type(n) is int and n >= 0 for n in numbers):
            raise Damaged("a tensor is described by other things than a storage and whole numbers")
        if len(size) != len(stride):
            raise Damaged(f"a tensor has {len(size)} sizes and {len(stride)} strides")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if 0 not in size and last >= storage.numel:
            raise Damaged(f"a tensor of shape {list(size)} runs past the end of its storage")
        item = storage.dtype.itemsize
        self._bytes[0] += math.prod(size) * item
        # With steps of 0, or many tensors of one storage, a small file could ask for any memory.
        if math.prod(size) > storage.numel or self._bytes[0] > SHARED * len(self._mapped):
            raise Damaged(f"a tensor of shape {list(size)} is larger than what is stored")
        begin = storage.begin + (0 if 0 in size else offset * item)
        strides = tuple(step * item for step in stride)
        return np.ndarray(size, storage.dtype, buffer=self._mapped, offset=begin, strides=strides)


class _Names(dict):
    """Stands for ``OrderedDict``; the attributes that torch gives one are left out."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


class _Dict:
    """Makes a ``_Names``, with or without its items; an instance, so no pickle can change it."""

    __slots__ = ()

    def __call__(self, items: Any = ()) -> _Names:
        if not isinstance(items, tuple | list):
            raise Damaged("the items of a mapping are no list")
        made = _Names()
        for key, value in items:
            if type(key) not in (str, int):
                raise Damaged("a key is neither a string nor a number")
            made[key] = value
        return made


class _Size:
    """Stands for ``torch.Size``: a tuple."""

    __slots__ = ()

    def __call__(self, numbers: Any = ()) -> tuple[Any, ...]:
        if not isinstance(numbers, tuple | list):
            raise Damaged("a tensor's shape is no list of numbers")
        return tuple(numbers)


class _Set:
    """Stands for ``set``, which DeepSpeed's engine saves beside the weights; it drops the items."""

    __slots__ = ()

    def __call__(self, items: Any = ()) -> tuple[()]:
        del items  # never hashed: hashes of chosen items can be made to collide
        return ()


class _Plain:
    """Stands for an object of named values, such as ``argparse.Namespace``; it drops the values.

    Lightning saves hyper-parameters so, beside the weights, and nothing here reads them. A class,
    because pickles make such objects without calling anything; it keeps nothing and has nothing
    that could be set.
    """

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


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
        scan(pickled, lambda module, name: _check_name(file, module, name))
        return _Unpickler(file, pickled, mapped, storages, big_endian).load()
    except UserError:
        raise
    except Exception as error:  # a hostile pickle can make the machine fail in any way it likes
        raise UserError(
            f"{file}: its pickle is damaged ({type(error).__name__}: {error}): fetch it again"
        ) from error


def _check_name(file: str, module: str, name: str) -> None:
    """Refuses a name that stands for no tensor and no plain container."""
    storage = module == "torch" and name in _STORAGES
    if not storage and (module, name) not in _ALLOWED:
        raise UserError(
            f"{file}: asks for {module}.{name}, which is no tensor: save its state_dict alone"
        )


_PLAIN = {
    ("argparse", "Namespace"),
    ("lightning.fabric.utilities.data", "AttributeDict"),
    ("lightning_fabric.utilities.data", "AttributeDict"),
    ("pytorch_lightning.utilities.parsing", "AttributeDict"),
}
_ALLOWED = {
    *_PLAIN,
    ("__builtin__", "set"),
    ("builtins", "set"),
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
        if (module, name) in _PLAIN:
            return _Plain
        if name in _STORAGES:
            return StorageType(_STORAGES[name])
        return {
            "OrderedDict": _Dict(),
            "set": _Set(),
            "Size": _Size(),
            "_rebuild_tensor_v2": _Tensor(self._mapped),
            "_rebuild_parameter": _Parameter(),
        }[name]

    def persistent_load(self, pid: Any) -> Storage:
        kind, storage_type, key, _, numel = pid
        if type(key) is not str:
            raise Damaged("the name of a storage is no string")
        if kind != "storage" or not isinstance(storage_type, StorageType) or type(numel) is not int:
            raise Damaged("it refers to something that is no storage")
        begin, size = self._storages[key]
        dtype = storage_type.dtype
        if numel < 0 or numel * dtype.itemsize > size:
            raise Damaged(f"storage {key} should hold {numel} numbers but has {size} bytes")
        if self._big_endian and dtype == jnp.bfloat16:
            raise UserError(f"{self._file}: bfloat16 in big-endian order: save it as float32")
        return Storage(dtype.newbyteorder(">") if self._big_endian else dtype, begin, numel)
