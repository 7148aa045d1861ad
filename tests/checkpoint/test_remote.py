# SPDX-License-Identifier: Apache-2.0
"""A checkpoint on a store is complete or does not exist, whatever fails on the way."""

import json
import shutil
import uuid

import pytest

from m2jax.bundle import load
from m2jax.checkpoint import remote
from m2jax.config import UserError
from m2jax.train import main
from tests import object_server
from tests.train import toy


@pytest.fixture
def url(tmp_path, monkeypatch):
    """An address in memory, staged in a folder of the test."""
    monkeypatch.setenv("M2JAX_STAGING", str(tmp_path / "staging"))
    return f"memory://{uuid.uuid4().hex}/run"


def local_run(folder, steps=(4,), files=3):
    """A work directory with made-up checkpoints."""
    for step in steps:
        for number in range(files):
            file = folder / "checkpoints" / str(step) / "state" / f"part{number}"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"x" * (number + step))
        for item in ("data", "bundle"):
            file = folder / "checkpoints" / str(step) / item / "part"
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(b"x")
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("broken", range(7))
def test_a_failed_upload_leaves_no_checkpoint(tmp_path, url, monkeypatch, broken):
    """The upload of the file number ``broken`` fails: the first is the config, the last the marker.

    The next pass uploads what is missing.
    """
    store, folder = remote.Store(url), local_run(tmp_path / "run")
    written = []

    def failing(real):
        def write(path, *args, **kwargs):
            if len(written) == broken:
                raise OSError("the connection broke")
            written.append(path)
            return real(path, *args, **kwargs)

        return write

    with monkeypatch.context() as patch:
        patch.setattr(store.fs, "put_file", failing(store.fs.put_file))
        patch.setattr(store.fs, "pipe_file", failing(store.fs.pipe_file))
        with pytest.raises(UserError, match="the connection broke"):
            remote.Mirror(store, folder).sync()
        assert len(written) == broken
    assert store.steps() == []
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        remote.fetched(url)
    remote.Mirror(store, folder).sync()
    assert store.steps() == [4]
    (tmp_path / "back").mkdir()
    back = store.pull(4, tmp_path / "back")
    assert [f.read_bytes() for f in remote.files(back)] == [
        f.read_bytes() for f in remote.files(folder / "checkpoints" / "4")
    ]


def test_a_removal_that_fails_half_way_leaves_no_checkpoint(tmp_path, url, monkeypatch):
    store, folder = remote.Store(url), local_run(tmp_path / "run", steps=(4, 8))
    mirror = remote.Mirror(store, folder)
    mirror.sync()
    shutil.rmtree(folder / "checkpoints" / "4")

    def broken(*args, **kwargs):
        raise OSError("the connection broke")

    with monkeypatch.context() as patch:
        patch.setattr(store.fs, "rm", broken)
        with pytest.raises(UserError, match="the connection broke"):
            mirror.sync()
    assert store.steps() == [8]
    mirror.sync()
    assert store.folders() == [8]


def test_a_file_cut_short_there_is_refused(tmp_path, url):
    store, folder = remote.Store(url), local_run(tmp_path / "run")
    remote.Mirror(store, folder).sync()
    store.fs.pipe_file(store.path("checkpoints/4/state/part2"), b"x")
    with pytest.raises(UserError, match="part2: 1 bytes, not 6"):
        store.pull(4, tmp_path)
    assert not (tmp_path / "4").exists()


@pytest.mark.parametrize("name", ["../../../config.json", "/tmp/x", "state//x", "state/./x"])
def test_a_marker_that_names_files_elsewhere_is_refused(tmp_path, url, name):
    store = remote.Store(url)
    store.mark(4, store.send(local_run(tmp_path / "run") / "checkpoints" / "4"))
    marker = json.dumps({"files": {name: 4}}).encode()
    store.fs.pipe_file(store.path("checkpoints", "4", "complete.json"), marker)
    (tmp_path / "a" / "b").mkdir(parents=True)
    with pytest.raises(UserError, match="lies outside of the checkpoint"):
        store.pull(4, tmp_path / "a" / "b")
    assert [p.name for p in (tmp_path / "a").rglob("*")] == ["b"]


def test_an_unknown_protocol_is_one_line():
    with pytest.raises(UserError, match=r"use a path, s3://\.\.\. or gs://"):
        remote.Store("nowhere://a/b")


def whole_story(url, monkeypatch, tmp_path):
    """Trains to step 5, loses this machine, trains to the end elsewhere, loads from the address."""
    cfg = toy.experiment(monkeypatch)
    main.run(cfg, tmp_path / "local")
    real = main.Loop.log

    class Killed(Exception):
        pass

    def log(self, step, *args):
        real(self, step, *args)
        if step == 5:
            self.checkpoints.wait()
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(main.Loop, "log", log)
        with pytest.raises(Killed):
            main.run(cfg, url)
    shutil.rmtree(remote.staging(url))
    assert main.run(cfg, url) == 0
    assert remote.Store(url).steps() == [3, 6, 8]
    shutil.rmtree(remote.staging(url))
    rows = [toy_rows(path) for path in (tmp_path / "local", remote.Store(url))]
    assert rows[0] == rows[1]
    assert load(url).params["logit_scale"] == load(tmp_path / "local").params["logit_scale"]


def toy_rows(place):
    """Step, loss and gradient norm of every row of a work directory, here or there."""
    import json

    text = (
        place.read("metrics.jsonl")
        if isinstance(place, remote.Store)
        else (place / "metrics.jsonl").read_bytes()
    )
    rows = [json.loads(line) for line in text.splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]


@pytest.mark.slow
def test_a_run_on_a_store_resumes_on_another_machine(url, monkeypatch, tmp_path):
    whole_story(url, monkeypatch, tmp_path)


def test_a_run_removed_from_the_store_begins_anew(url, monkeypatch, tmp_path):
    store = remote.Store(url)
    with remote.mirrored(url) as folder:
        local_run(folder)
    assert store.steps() == [4]
    store.fs.rm(store.path(), recursive=True)
    with remote.mirrored(url) as folder:
        assert not list((folder / "checkpoints").iterdir())
    (aside,) = folder.parent.glob(f"{folder.name}.aside-*")  # it may have been all there was
    assert (aside / "checkpoints" / "4" / "state").is_dir()


def test_one_checkpoint_and_a_model_folder_can_be_named(tmp_path, url):
    folder = local_run(tmp_path / "run", steps=(4, 8))
    remote.Mirror(remote.Store(url), folder).sync()
    assert remote.fetched(url).name == "8"
    assert remote.fetched(f"{url}/checkpoints/4/").name == "4"
    with pytest.raises(UserError, match="has no complete step 5"):
        remote.fetched(f"{url}/checkpoints/5")
    model = remote.Store(url.replace("run", "model"))
    for file in ("config.json", "weights.safetensors"):
        model.fs.pipe_file(model.path(file), b"{}")
    found = remote.fetched(model.url)
    assert {file.name for file in found.iterdir()} == {"config.json", "weights.safetensors"}


@pytest.fixture(params=["s3", "gs"])
def bucket(request, monkeypatch, tmp_path):
    """A run's address in a bucket of a local server."""
    monkeypatch.setenv("M2JAX_STAGING", str(tmp_path / "staging"))
    with object_server.serving(monkeypatch, request.param):
        yield f"{request.param}://runs/a"


@pytest.mark.slow
def test_a_run_in_a_bucket_resumes_on_another_machine(bucket, monkeypatch, tmp_path):
    whole_story(bucket, monkeypatch, tmp_path)


def test_a_bucket_that_is_not_there_is_one_line(bucket, monkeypatch):
    with (
        pytest.raises(UserError, match="could not be written") as caught,
        remote.mirrored(bucket.replace("runs", "other")) as folder,
    ):
        local_run(folder)
    assert "\n" not in str(caught.value)
