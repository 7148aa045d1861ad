# SPDX-License-Identifier: Apache-2.0
"""Arrays from anywhere: what a header claims is compared with the file before it is allocated."""

import io
import tracemalloc
import zipfile

import numpy as np
import pytest

from m2jax.data import npz
from tests.data.hostile import TERABYTES, archive, npy

GOOD = np.arange(16, dtype=np.float32).reshape(4, 4)
HOSTILE = {
    "terabytes": TERABYTES,
    "terabytes, version 2": npy((2**20, 2**20), version=2),
    "64 bits overflow to what is there": npy((2**32 + 1, 2**32, 16)),
    "64 bits overflow to none": npy((2**32, 2**32), body=b""),
    "more than 4,300 digits": npy((10**2400, 10**2400)),
    "less than there is": npy((4, 3)),
    "below none": npy((-4, -4)),
    "elements of no bytes": npy((2**40,), descr="|V0", body=b""),
    "objects": npy((8,), descr="|O"),
    "no version": npy((4, 4), version=3),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_headers_that_claim_what_is_not_there_are_refused(tmp_path, what):
    body = HOSTILE[what]
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"claims|objects|version") as error:
        npz.read_npy(io.BytesIO(body), len(body))
    with pytest.raises(ValueError, match=r"claims|objects|version"):
        npz.read(archive(tmp_path / "a.npz", body, npy((4, 4))))
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()
    assert len(str(error.value)) < 200


def test_an_array_is_what_was_saved(tmp_path):
    kinds = {
        "rows": GOOD, "columns": np.asfortranarray(GOOD), "names": np.array(["a", "bcd"]),
        "none": GOOD[:0], "one": np.array("x"), "pairs": np.zeros(3, [("a", "<i4"), ("b", "S3")]),
    }  # fmt: skip
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", **kinds)
        found = npz.read(tmp_path / "a.npz")
        assert list(found) == list(kinds)
        for name, own in kinds.items():
            np.testing.assert_array_equal(found[name], own)
            assert found[name].dtype == own.dtype
    assert list(npz.read(tmp_path / "a.npz", "one", "rows")) == ["one", "rows"]
    with pytest.raises(KeyError, match="other"):
        npz.read(tmp_path / "a.npz", "other")


def test_a_header_that_is_too_long_is_one_short_line(tmp_path):
    body = npy((4, 4), descr="f4" + " " * 20_000)
    for stream in (body, npy("(" * 400), npy((4, 4), descr="x" * 5000)):
        with pytest.raises(npz.DAMAGED) as error:
            npz.read_npy(io.BytesIO(stream), len(stream))
        assert "\n" not in npz.reason(error.value)
        assert 10 < len(npz.reason(error.value)) <= 120


def test_a_header_of_version_2_is_read():
    body = npy((2, 8), version=2)
    np.testing.assert_array_equal(npz.read_npy(io.BytesIO(body), len(body)), np.zeros((2, 8)))


@pytest.mark.parametrize("how", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("packed_bytes", [None, 2**30 - 1])
def test_a_table_that_claims_more_than_the_file_holds_is_refused(tmp_path, how, packed_bytes):
    body = npy((2**30,), descr="|i1")
    file = archive(tmp_path / "a.npz", body, how=how)
    with zipfile.ZipFile(file, "a") as packed:
        (member,) = packed.infolist()
        member.file_size = len(body) - 64 + 2**30  # as the array's header claims
        member.compress_size = packed_bytes or member.compress_size
        packed.comment = b"so that the table is written anew"
    with pytest.raises(ValueError, match=r"features\.npy: claims 1,073,741,\d+ bytes out of \d"):
        npz.read(file)


def test_what_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", one=np.zeros(2**17), other=np.zeros(2**17), few=GOOD)
    assert npz.read(tmp_path / "a.npz")["other"].shape == (2**17,)
    monkeypatch.setattr(npz, "UNPACKED_BYTES", 2**20 + 2**10)
    with pytest.raises(ValueError, match="unpacks to over 1,049,600 bytes"):
        npz.read(tmp_path / "a.npz")
    assert list(npz.read(tmp_path / "a.npz", "one", "few")) == ["one", "few"]
    monkeypatch.setattr(npz, "UNPACKED_BYTES", 0)  # what shrinks as features and names do
    names = np.array([f"photographs/{number:08d}.jpg" for number in range(2000)])
    np.savez_compressed(tmp_path / "b.npz", ids=names)
    np.testing.assert_array_equal(npz.read(tmp_path / "b.npz")["ids"], names)


@pytest.mark.parametrize("how", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_methods_without_a_bound_are_refused(tmp_path, how):
    file = archive(tmp_path / "a.npz", npy((4, 4)), how=how)
    with pytest.raises(ValueError, match="packed by a method that NumPy does not write"):
        npz.read(file)
