# SPDX-License-Identifier: Apache-2.0
"""Files as ``torch.save`` writes them, made without torch."""

import io
import pickle
import sys
import types
import zipfile

import jax.numpy as jnp
import numpy as np

STORAGES = {
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
}


def _module(name, **contents):
    module = types.ModuleType(name)
    vars(module).update(contents)
    for value in contents.values():
        value.__module__ = name
    return module


def _rebuild_tensor_v2(*args):
    """Only ever named, never called."""


def _rebuild_parameter(*args):
    """Only ever named, never called."""


for function in (_rebuild_tensor_v2, _rebuild_parameter):
    function.__qualname__ = function.__name__
TORCH = {
    "torch": _module("torch", **{name: type(name, (), {}) for name in STORAGES.values()}),
    "torch._utils": _module(
        "torch._utils",
        _rebuild_tensor_v2=_rebuild_tensor_v2,
        _rebuild_parameter=_rebuild_parameter,
    ),
}


class Tensor:
    """A strided view of a flat array, pickled as torch does."""

    def __init__(self, flat, size, stride, offset=0, *, numel=None, parameter=False):
        self.flat, self.size, self.stride, self.offset = flat, size, stride, offset
        self.numel = flat.size if numel is None else numel
        self.parameter = parameter


def whole(array, **options):
    """A contiguous tensor with a storage of its own."""
    array = np.ascontiguousarray(array).reshape(np.shape(array))
    steps = [s // array.itemsize for s in array.strides]
    return Tensor(array.reshape(-1), array.shape, tuple(steps), **options)


class _Pickler(pickle.Pickler):
    def __init__(self, file, protocol):
        super().__init__(file, protocol)
        self.storages = []  # arrays by key; a shared one has one key

    def persistent_id(self, obj):
        if not isinstance(obj, np.ndarray):
            return None
        keys = [key for key, known in enumerate(self.storages) if known is obj]
        if not keys:
            keys = [len(self.storages)]
            self.storages.append(obj)
        kind = getattr(TORCH["torch"], STORAGES[obj.dtype.name])
        return ("storage", kind, str(keys[0]), "cpu", getattr(self, "numel", obj.size))

    def reducer_override(self, obj):
        if not isinstance(obj, Tensor):
            return NotImplemented
        if obj.parameter:
            inner = Tensor(obj.flat, obj.size, obj.stride, obj.offset, numel=obj.numel)
            return _rebuild_parameter, (inner, True, {})
        self.numel = obj.numel
        return _rebuild_tensor_v2, (obj.flat, obj.offset, obj.size, obj.stride, False, {})


def pickled(content, protocol=2):
    """The pickle of some content, and its storages."""
    saved = {name: sys.modules.get(name) for name in TORCH}
    sys.modules.update(TORCH)
    try:
        buffer = io.BytesIO()
        pickler = _Pickler(buffer, protocol)
        pickler.dump(content)
    finally:
        for name, module in saved.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module
    return buffer.getvalue(), pickler.storages


def save(path, content, *, protocol=2, byteorder="little", root="archive"):
    """What ``torch.save(content, path)`` would write."""
    data, storages = pickled(content, protocol)
    write(path, data, [_bytes(array, byteorder) for array in storages], byteorder, root)


def write(path, data, storages=(), byteorder="little", root="archive"):
    """A torch file of a given pickle and given storages."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{root}/data.pkl", data)
        archive.writestr(f"{root}/byteorder", byteorder)
        for key, raw in enumerate(storages):
            archive.writestr(f"{root}/data/{key}", raw)
        archive.writestr(f"{root}/version", "3\n")


def _bytes(array, byteorder):
    if byteorder == "big" and array.dtype != jnp.bfloat16:
        array = array.astype(array.dtype.newbyteorder(">"))
    return array.tobytes()
