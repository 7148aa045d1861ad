# SPDX-License-Identifier: Apache-2.0
"""Weight files: read as they are meant, refused in one line when they are not."""

import argparse
import collections
import io
import json
import os
import pickle
import re
import struct
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from m2jax.checkpoint.convert import safetensors_file, weights
from m2jax.config import UserError
from tests.checkpoint.convert import torch_files
from tests.checkpoint.convert.torch_files import Tensor, whole

RNG = np.random.default_rng(0)
BASE = RNG.normal(size=24).astype(np.float32)


def refused(path, match):
    """The error is one line and names the file."""
    with pytest.raises(UserError) as caught:
        weights.read(path)
    where, message = str(path), str(caught.value)
    assert "\n" not in message
    assert where in message
    assert re.search(match, message.replace(where, "FILE")), message


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("byteorder", ["little", "big"])
def test_tensors_of_every_kind(tmp_path, protocol, byteorder):
    square = BASE.reshape(4, 6)
    expected = {
        "plain": square,
        "slice": square[1:, 2:],
        "turned": square.T,
        "repeated": np.broadcast_to(BASE[:1], (5,)),
        "scalar": np.float32(3.5),
        "empty": np.zeros((0, 3), np.float32),
        "half": RNG.normal(size=3).astype(np.float16),
        "double": RNG.normal(size=3),
        "whole": np.arange(3),
    }
    tensors = {name: whole(array) for name, array in expected.items()}
    tensors["plain"] = Tensor(BASE, (4, 6), (6, 1))
    tensors["slice"] = Tensor(BASE, (3, 4), (6, 1), 8)  # of the same storage
    tensors["turned"] = Tensor(BASE, (6, 4), (1, 6), parameter=True)
    tensors["repeated"] = Tensor(BASE, (5,), (0,))
    if byteorder == "little":
        expected["brain"] = RNG.normal(size=(2, 2)).astype(jnp.bfloat16)
        tensors["brain"] = whole(expected["brain"])
    content = {"state_dict": collections.OrderedDict(tensors), "epoch": 3, "lr": [0.1, None, (1,)]}
    file = tmp_path / "model.ckpt"
    torch_files.save(file, content, protocol=protocol, byteorder=byteorder)
    read = weights.read(file).content
    assert (read["epoch"], read["lr"]) == (3, [0.1, None, (1,)])
    assert set(read["state_dict"]) == set(expected)
    for name, array in expected.items():
        found = read["state_dict"][name]
        assert found.dtype == np.asarray(array).dtype.newbyteorder(
            "=" if byteorder == "little" else ">"
        )
        np.testing.assert_array_equal(found, array)
        assert not found.flags.owndata  # a view of the file, which took no memory
        assert not found.flags.writeable


def test_safetensors_are_views_of_the_file(tmp_path):
    arrays = {
        "a": BASE.reshape(2, 12),
        "scalar": np.array(1.5, np.float16),
        "empty": np.zeros((3, 0), np.float32),
        "brain": RNG.normal(size=(2, 2)).astype(jnp.bfloat16),
        "whole": np.arange(4),
    }
    save_file(arrays, tmp_path / "m.safetensors", metadata={"format": "pt"})
    read = weights.read(tmp_path).content
    assert set(read) == set(arrays)
    for name, array in arrays.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)
        assert not read[name].flags.owndata


@pytest.mark.parametrize("shape", [[1] * 100, [0, 2**63]])
def test_a_shape_that_no_array_has(tmp_path, shape):
    size = 4 if shape[0] else 0
    header = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}).encode()
    file = tmp_path / "m.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * size)
    refused(file, "w: no such shape")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_library_reads_what_is_written_here(tmp_path, dtype):
    arrays = {"s": np.array(2.0), "odd": BASE[:3], "m": BASE.reshape(4, 6).T, "none": BASE[:0]}
    arrays = {name: array.astype(jnp.dtype(dtype)) for name, array in arrays.items()}
    file = tmp_path / "m.safetensors"
    shapes = {name: array.shape for name, array in arrays.items()}
    with file.open("wb") as handle:
        safetensors_file.write(handle, shapes, np.dtype(dtype), arrays.__getitem__)
    again = tmp_path / "again.safetensors"
    save_file({n: np.ascontiguousarray(a).reshape(a.shape) for n, a in arrays.items()}, again)
    ours, theirs = weights.read(file).content, weights.read(again).content
    for name, array in arrays.items():
        np.testing.assert_array_equal(ours[name], array)
        np.testing.assert_array_equal(theirs[name], array)
        assert ours[name].ctypes.data % ours[name].itemsize == 0


class Touch:
    """Makes a file when it is unpickled by an honest unpickler."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("protocol", [2, 4])
def test_code_in_a_pickle_is_refused_by_name(tmp_path, protocol):
    file, trap = tmp_path / "m.ckpt", tmp_path / "trap"
    content = {"state_dict": {"w": whole(BASE)}, "callbacks": Touch(trap)}
    torch_files.save(file, content, protocol=protocol)
    refused(file, r"asks for (posix|nt|os)\.mkdir, which is no tensor")
    assert not trap.exists()
    torch_files.save(file, {"hparams": argparse.Namespace(a=Touch(trap))}, protocol=protocol)
    refused(file, r"asks for (posix|nt|os)\.mkdir")
    torch_files.save(file, {"parser": argparse.ArgumentParser}, protocol=protocol)
    refused(file, r"asks for argparse\.ArgumentParser")
    assert not trap.exists()


@pytest.mark.parametrize("protocol", [2, 4])
def test_hyper_parameters_beside_the_weights_are_passed_over(tmp_path, protocol):
    """Lightning saves them as objects of argparse's and of its own."""
    inner = argparse.Namespace(lr=0.1, layers=[1, 2], deep=argparse.Namespace(a=None))
    content = {"hyper_parameters": {"config": inner}, "state_dict": {"w": whole(BASE)}}
    torch_files.save(tmp_path / "m.ckpt", content, protocol=protocol)
    read = weights.read(tmp_path / "m.ckpt").content
    np.testing.assert_array_equal(read["state_dict"]["w"], BASE)
    stands = read["hyper_parameters"]["config"]
    assert not isinstance(stands, argparse.Namespace)
    assert not hasattr(stands, "lr")


def test_lightnings_own_mapping_is_passed_over(tmp_path):
    made = b"cpytorch_lightning.utilities.parsing\nAttributeDict\n)\x81(U\x02lrK\x01u"
    torch_files.write(tmp_path / "m.ckpt", program(b"}U\x01h", made, b"s"))
    assert list(weights.read(tmp_path / "m.ckpt").content) == ["h"]


def program(*parts):
    """A pickle of protocol 2 by hand."""
    return b"\x80\x02" + b"".join(parts) + b"."


REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
PLAIN = b"cargparse\nNamespace\n"
NAMES, FLOATS = b"ccollections\nOrderedDict\n", b"ctorch\nFloatStorage\n"
STORED = b"(U\x07storage" + FLOATS + b"U\x010U\x03cpuK\x18tQ"  # all of BASE


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (program(b"cbuiltins\neval\n", b"(U\x011tR"), r"builtins\.eval"),
        (program(b"ctorch\n_utils._rebuild_tensor_v2\n"), r"torch\._utils\._rebuild"),
        (program(b"ccollections\nOrderedDict.__init__\n"), "OrderedDict.__init__"),
        (program(b"}r\xff\xff\xff\x7f"), "memo index"),  # would take 16 GiB of memory
        (program(b"}p99999999\n"), "memo index"),
        (program(REBUILD, b"}b"), "damaged"),  # sets attributes of what rebuilds tensors
        (program(REBUILD, b"N}U\x08__call__Ns\x86b"), "damaged"),
        (program(REBUILD, b"N}U\x07_mappedNs\x86b"), "damaged"),
        (program(b"ccollections\nOrderedDict\n", b"N}U\x04keysNs\x86b"), "damaged"),
        (program(PLAIN, b"}U\x01aNsb"), "damaged"),  # sets attributes of what stands for a class
        (program(PLAIN, b"N}U\x0c__setstate__Ns\x86b"), "damaged"),
        (program(PLAIN, b"}K\x01\x85R"), "damaged"),
        (program(PLAIN, b"(K\x01tR"), "damaged"),
        (program(b"cargparse\nNamespace.__class__\n"), "Namespace.__class__"),
        (program(b"}", PLAIN, b")\x81Ns"), "a key is neither"),
        (program(REBUILD, b"(NK\x00K\x01K\x01tR"), "damaged"),
        (program(b"U\x01xQ"), "damaged"),
        (program(b"(U\x07storageNU\x010U\x03cpuK\x01tQ"), "no storage"),
        (program(b"}K\x01", b"\x85" * 300_000, b"Ns"), "a key is neither"),  # overflows the stack
        (program(b"}K\x01", b"\x85" * 300_000, b"r\x01\0\0\0Nsh\x01"), "a key is neither"),
        (program(b"}K\x01", b"2\x86" * 60, b"Ns"), "a key is neither"),  # 2 ** 60 steps to hash
        (program(b"}(K\x01", b"2\x86" * 60, b"Nu"), "a key is neither"),
        (program(b"(K\x01", b"2\x86" * 60, b"Nd"), "a key is neither"),
        (program(b"}K\x01", b"2\x86" * 60, b"q\0Nsh\0"), "a key is neither"),
        (program(NAMES, b"(](K\x01", b"2\x86" * 60, b"NtatR"), "a key is neither"),
        (program(b"\x8f(K\x01", b"2\x86" * 60, b"\x90"), "a set"),
        (program(b"(U\x07storage", FLOATS, b"K\x01", b"\x85" * 300_000, b"NNtQ"), "no string"),
        (program(b"]"), "holds a list"),
        (b"\x80\x02}", "damaged"),
        (b"", "damaged"),
        (b"\xff\xff", "damaged"),
    ],
)
def test_hostile_pickles(tmp_path, data, match):
    file = tmp_path / "m.ckpt"
    torch_files.write(file, data, [BASE.tobytes()])
    refused(file, match)


@pytest.mark.parametrize(
    ("tensor", "match"),
    [
        (Tensor(BASE, (4, 7), (7, 1)), r"shape \[4, 7\] runs past"),
        (Tensor(BASE, (24,), (1,), 1), "runs past"),
        (Tensor(BASE, (2,), (24,)), "runs past"),
        (Tensor(BASE, (2,), (-1,), 5), "whole numbers"),
        (Tensor(BASE, (2,), (1,), -1), "whole numbers"),
        (Tensor(BASE, (True,), (1,)), "whole numbers"),
        (Tensor(BASE, (2, 2), (1,)), "2 sizes and 1 strides"),
        (Tensor(BASE, (2**62,), (1,)), "runs past"),
        (Tensor(BASE, (25,), (1,), numel=25), "should hold 25 numbers but has 96 bytes"),
        (Tensor(BASE, (1,), (1,), numel=-1), "should hold -1"),
    ],
)
def test_a_tensor_never_leaves_its_storage(tmp_path, tensor, match):
    torch_files.save(tmp_path / "m.ckpt", {"secret": whole(RNG.normal(size=99)), "w": tensor})
    refused(tmp_path / "m.ckpt", match)


@pytest.mark.parametrize("numbers", [b"ctorch\nSize\n", REBUILD + b"(" + STORED + b"K\0"])
def test_a_tensor_is_no_list_of_numbers(tmp_path, numbers):
    """A shape as long as the file has numbers would take many times its memory."""
    tensor = REBUILD + b"(" + STORED + b"K\0K\x18\x85K\x01\x85\x89NtR"
    rest = b"\x85R" if b"Size" in numbers else b"K\x01\x85\x89NtR"
    torch_files.write(tmp_path / "m.ckpt", program(numbers, tensor, rest), [BASE.tobytes()])
    refused(tmp_path / "m.ckpt", "shape is no list")


def test_a_small_file_cannot_ask_for_much_memory(tmp_path):
    file = tmp_path / "m.ckpt"
    torch_files.save(file, {"w": Tensor(BASE, (2**40,), (0,))})
    refused(file, "larger than what is stored")
    big = RNG.normal(size=10**5).astype(np.float32)
    many = {str(n): Tensor(big, big.shape, (1,)) for n in range(4)}  # tied weights are honest
    torch_files.save(file, many)
    assert len(weights.read(file).content) == 4
    many = {str(n): Tensor(big, big.shape, (1,)) for n in range(12)}
    torch_files.save(file, many)
    refused(file, "larger than what is stored")


def test_a_mapping_keeps_no_attributes(tmp_path):
    """Torch gives state dicts one; a hostile file could put anything over their methods."""
    file = tmp_path / "m.ckpt"
    torch_files.write(file, program(NAMES, b")R}U\x05itemsNsb"))
    assert list(weights.read(file).content.items()) == []


def test_keys_may_be_numbers(tmp_path):
    """As in the state of an optimizer."""
    content = {"state": {0: {"step": 1}, 2**40: 2}, "pairs": collections.OrderedDict(a=(1, 2))}
    for protocol in (0, 2, 4):
        torch_files.save(tmp_path / "m.ckpt", content, protocol=protocol)
        assert weights.read(tmp_path / "m.ckpt").content == content


def test_what_a_pickle_does_changes_nothing_for_the_next(tmp_path):
    torch_files.write(tmp_path / "bad.ckpt", program(REBUILD, b"N}U\x0c__defaults__)s\x86b"))
    refused(tmp_path / "bad.ckpt", "damaged")
    torch_files.save(tmp_path / "good.ckpt", {"w": whole(BASE)})
    np.testing.assert_array_equal(weights.read(tmp_path / "good.ckpt").content["w"], BASE)


def zipped(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, raw in members:
            archive.writestr(name, raw)


GOOD, _ = torch_files.pickled({})


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("members", "match"),
    [
        ([("a/data.pkl", GOOD), ("a/data.pkl", GOOD)], "there twice"),
        ([("a/data.pkl", GOOD), ("b/data.pkl", GOOD)], "there twice"),
        ([("a/data.pkl", GOOD), ("a/../../x", b"")], "do not use it"),
        ([("/a/data.pkl", GOOD)], "do not use it"),
        ([("a/data.pkl", GOOD), ("a/..\\x", b"")], "do not use it"),
        ([("a/constants.pkl", GOOD)], "without torch's data.pkl"),
        ([("a/deep/data.pkl", GOOD)], "without torch's data.pkl"),
    ],
)
def test_odd_archives(tmp_path, members, match):
    zipped(tmp_path / "m.ckpt", members)
    refused(tmp_path / "m.ckpt", match)


def test_compressed_members_are_refused_before_they_grow(tmp_path):
    file = tmp_path / "m.ckpt"
    zipped(file, [("a/data.pkl", b"\0" * 2**28)], zipfile.ZIP_DEFLATED)
    assert file.stat().st_size < 2**20
    refused(file, "compressed")


def test_an_oversized_pickle_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("m2jax.checkpoint.convert.torch_zip.PICKLE_LIMIT", 100)
    torch_files.save(tmp_path / "m.ckpt", {"w": whole(BASE)})
    refused(tmp_path / "m.ckpt", "no honest checkpoint")


def test_big_endian_bfloat16_is_refused(tmp_path):
    content = {"w": whole(BASE.astype(jnp.bfloat16))}
    torch_files.save(tmp_path / "m.ckpt", content, byteorder="big")
    refused(tmp_path / "m.ckpt", "big-endian")


def test_every_truncation_is_an_error(tmp_path):
    """Wherever a download may have ended."""
    file, cut = tmp_path / "whole", tmp_path / "cut"
    for save in (
        lambda: torch_files.save(file, {"w": whole(BASE)}),
        lambda: save_file({"w": BASE}, file),
    ):
        save()
        raw = file.read_bytes()
        for length in range(0, len(raw), 7):
            cut.write_bytes(raw[:length])
            refused(cut, r"truncated|damaged|is empty|neither")


def test_a_lying_local_header_is_an_error(tmp_path):
    file = tmp_path / "m.ckpt"
    torch_files.save(file, {"w": whole(BASE)})
    raw = bytearray(file.read_bytes())
    raw[26:30] = struct.pack("<HH", 0xFFFF, 0xFFFF)  # lengths of the first name and extra field
    file.write_bytes(raw)
    refused(file, "data.pkl' is truncated")


def test_other_files_are_refused(tmp_path):
    pickle_file = io.BytesIO()
    pickle.dump({"w": 1}, pickle_file, 2)
    for raw, match in (
        (b"", "is empty"),
        (b"<html>404</html>", "neither a safetensors nor a torch file"),
        (pickle_file.getvalue(), "before version 1.6"),
    ):
        (tmp_path / "m.ckpt").write_bytes(raw)
        refused(tmp_path / "m.ckpt", match)
    header = b'{"w":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]}}'
    (tmp_path / "m.ckpt").write_bytes(struct.pack("<Q", len(header)) + header + b"\0")
    refused(tmp_path / "m.ckpt", "F8_E4M3")


def test_a_folder_must_hold_one_weight_file(tmp_path):
    refused(tmp_path / "none", "no such file")
    refused(tmp_path, "holds no weight file")
    for name in ("b.ckpt", "a.ckpt"):
        torch_files.save(tmp_path / name, {"w": whole(BASE)})
    refused(tmp_path, r"several weight files \(a.ckpt, b.ckpt\)")
    save_file({"w": BASE}, tmp_path / "m.safetensors")
    assert weights.read(tmp_path).file.name == "m.safetensors"


def test_a_torchscript_program_is_told_from_a_checkpoint(tmp_path):
    members = [("a/code/__torch__.py", b"def f(): pass"), ("a/data.pkl", b"")]
    zipped(tmp_path / "ViT-B-32.pt", members, zipfile.ZIP_DEFLATED)
    refused(tmp_path / "ViT-B-32.pt", "a TorchScript program")


def test_weights_in_several_files_are_read_by_their_index(tmp_path):
    parts = {"model-00001-of-00002.safetensors": "a", "model-00002-of-00002.safetensors": "b"}
    for file, name in parts.items():
        save_file({name: np.full(3, ord(name), np.float32)}, tmp_path / file)
    index = tmp_path / weights.INDEX
    index.write_text(json.dumps({"weight_map": {name: file for file, name in parts.items()}}))
    found = weights.read(tmp_path)
    assert found.file == index
    assert {name: x[0] for name, x in found.content.items()} == {"a": 97, "b": 98}
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    refused(tmp_path, "model-00002-of-00002.safetensors: no such file")


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "x.bin", 3])
def test_an_index_names_only_files_beside_it(tmp_path, name):
    (tmp_path / weights.INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    refused(tmp_path, "index")


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}'])
def test_a_damaged_index_is_refused(tmp_path, text):
    (tmp_path / weights.INDEX).write_text(text)
    refused(tmp_path, "no index of weight files")


def test_a_tensor_in_two_files_is_refused(tmp_path):
    save_file({"w": BASE, "a": BASE}, tmp_path / "1.safetensors")
    save_file({"w": BASE + 1}, tmp_path / "2.safetensors")
    index = {"weight_map": {"a": "1.safetensors", "w": "2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(tmp_path, "w is in another file too")


def test_a_deep_index_is_refused(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("[" * 200_000)
    refused(tmp_path, "no index")
