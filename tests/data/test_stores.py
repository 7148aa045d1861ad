# SPDX-License-Identifier: Apache-2.0
"""Files on a store are copied once, whole, and anew when they change there."""

import threading
import uuid

import pytest

from m2jax.config import UserError
from m2jax.data import stores
from tests import object_server


@pytest.fixture
def bucket(tmp_path):
    """A folder in memory, with two files and a folder below it."""
    root = f"memory://{uuid.uuid4().hex}"
    fs, path = stores.opened(root)
    for name in ("a-0.tar", "a-1.tar", "b.tar", "set/x/0.txt", "set/1.txt"):
        fs.pipe_file(f"{path}/{name}", name.encode())
    return root, fs, path, tmp_path / "cache"


def test_patterns_files_and_folders_are_copied(bucket):
    root, _, _, cache = bucket
    found = stores.matching([f"{root}/a-?.tar", f"{root}/b.tar"], "data.files", cache)
    assert [f.name for f in found] == ["a-0.tar", "a-1.tar", "b.tar"]
    assert [f.read_text() for f in found] == ["a-0.tar", "a-1.tar", "b.tar"]
    for address in (f"{root}/set", f"{root}/set/"):
        (folder,) = stores.matching([address], "data.files", cache)
        inside = {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()}
        assert (folder.name, inside) == ("set", {"x/0.txt", "1.txt"})


def test_local_patterns_are_sorted_and_missing_ones_are_one_line(tmp_path, bucket):
    root, _, _, cache = bucket
    for name in ("b", "a"):
        (tmp_path / name).touch()
    assert stores.matching([f"{tmp_path}/?"], "x") == [tmp_path / "a", tmp_path / "b"]
    for pattern in (f"{tmp_path}/none*", f"{root}/none*", f"{root}/none"):
        with pytest.raises(UserError, match=r"^data\.files: .*none.* matches no file"):
            stores.matching([pattern], "data.files", cache)
    with pytest.raises(UserError, match="nope://"):
        stores.matching(["nope://x/y"], "data.files", cache)


def test_a_copy_is_made_once_and_again_when_the_file_changes(bucket, monkeypatch):
    root, fs, path, cache = bucket
    copies = []
    real = fs.get_file
    monkeypatch.setattr(fs, "get_file", lambda *a, **k: (copies.append(a[0]), real(*a, **k)))

    def text():
        (file,) = stores.matching([f"{root}/b.tar"], "data.files", cache)
        return file.read_text()

    assert [text(), text(), len(copies)] == ["b.tar", "b.tar", 1]
    fs.pipe_file(f"{path}/b.tar", b"new")
    assert [text(), text(), len(copies)] == ["new", "new", 2]


@pytest.mark.parametrize("cut", [True, False])
def test_a_copy_that_fails_leaves_nothing_behind(bucket, monkeypatch, cut):
    root, fs, _, cache = bucket
    real = fs.get_file

    def broken(source, local, **others):
        if source.endswith("1.txt") and not cut:
            raise OSError("the connection broke")
        real(source, local, **others)
        if cut:
            with open(local, "ab") as file:
                file.truncate(1)

    with monkeypatch.context() as patch:
        patch.setattr(fs, "get_file", broken)
        with pytest.raises(UserError, match="1 bytes came" if cut else "the connection broke"):
            stores.matching([f"{root}/set"], "data.files", cache)
    assert [f for f in cache.iterdir() if f.suffix != ".lock"] == []
    assert stores.matching([f"{root}/set"], "data.files", cache)[0].is_dir()


def test_processes_that_want_one_file_copy_it_once(bucket, monkeypatch):
    root, fs, _, cache = bucket
    copies, kind = [], type(fs)  # each thread has a file system of its own
    real = kind.get_file
    monkeypatch.setattr(kind, "get_file", lambda *a, **k: (copies.append(a[1]), real(*a, **k)))
    threads = [
        threading.Thread(target=stores.matching, args=([f"{root}/b.tar"], "x", cache))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(copies) == 1


def test_names_that_lead_elsewhere_are_refused(bucket, monkeypatch):
    root, fs, path, cache = bucket
    about = fs.info(f"{path}/b.tar")
    monkeypatch.setattr(fs, "find", lambda *a, **k: {f"{path}/set/../../out": about})
    with pytest.raises(UserError, match="would lie elsewhere"):
        stores.matching([f"{root}/set"], "data.files", cache)
    assert not (cache.parent / "out").exists()


@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_a_real_server_tells_versions_apart(tmp_path, monkeypatch, kind):
    with object_server.serving(monkeypatch, kind) as fs:
        fs.pipe_file("runs/data/x/0.txt", b"one")
        fs.pipe_file("runs/data/1.txt", b"two")

        def texts(*patterns):
            named = [f"{kind}://runs/{pattern}" for pattern in patterns]
            found = stores.matching(named, "x", tmp_path / "cache")
            files = (f for top in found for f in ([top] if top.is_file() else top.rglob("*.txt")))
            return {file.read_text() for file in files}

        assert texts("data") == {"one", "two"}
        assert texts("data/*.txt", "data/x/0.txt") == {"one", "two"}
        fs.pipe_file("runs/data/1.txt", b"six")  # as long as before
        assert texts("data") == {"one", "six"}
        with pytest.raises(UserError, match="matches no file"):
            texts("data/none-*")
        with pytest.raises(UserError, match=f"{kind}://runs/none"):
            texts("none")
