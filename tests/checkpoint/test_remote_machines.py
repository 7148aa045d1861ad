# SPDX-License-Identifier: Apache-2.0
"""A run on a store that several machines, or several processes of one, have to do with in turn."""

import json
import shutil
import threading
import uuid

import pytest

from m2jax import config
from m2jax.checkpoint import remote
from m2jax.config import UserError
from m2jax.train import main

ITEMS = ("state", "data", "bundle")


@pytest.fixture
def url(tmp_path, monkeypatch):
    """An address in memory, staged in a folder of the test."""
    monkeypatch.setenv("M2JAX_STAGING", str(tmp_path / "staging"))
    return f"memory://{uuid.uuid4().hex}/run"


def save(folder, *steps, text="x"):
    """Made-up checkpoints in a work directory."""
    for step in steps:
        for item in ITEMS:
            file = folder / "checkpoints" / str(step) / item / "part"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{text}{step}")


def first_machine(url, *steps):
    """A run there with logs, then this machine is lost."""
    with remote.mirrored(url) as folder:
        (folder / "config.json").write_text("{}")
        save(folder, *steps)
        for name in ("metrics.jsonl", "goodput.jsonl", "origin.json"):
            (folder / name).write_text(f"{name} to {steps[-1]}\n")
        (folder / "checkpoints" / "best").write_text("200\n")
    shutil.rmtree(remote.staging(url))
    return remote.Store(url)


def test_another_machine_leaves_checkpoints_and_logs_there(url):
    store = first_machine(url, 100, 200, 300, 400)
    with remote.mirrored(url) as folder:
        assert {p.name for p in (folder / "checkpoints").iterdir()} == {"200", "400", "best"}
        for name in ("metrics.jsonl", "goodput.jsonl", "origin.json"):
            assert (folder / name).read_text() == f"{name} to 400\n"
        save(folder, 500)
    assert store.steps() == [100, 200, 300, 400, 500]
    assert store.read("checkpoints", "best") == b"200\n"


def test_what_this_machine_had_and_removed_goes_there_too(url):
    store = first_machine(url, 100, 200, 300, 400)
    with remote.mirrored(url) as folder:
        shutil.rmtree(folder / "checkpoints" / "400")
        save(folder, 500)
    assert store.steps() == [100, 200, 300, 500]


def test_a_stale_copy_of_the_run_is_set_aside(url):
    store = first_machine(url, 100, 200, 300)
    stale = remote.staging(url)
    save(stale, 50)
    (stale / "metrics.jsonl").write_text("metrics.jsonl to 50\n")
    with remote.mirrored(url) as folder:
        assert (folder / "metrics.jsonl").read_text() == "metrics.jsonl to 300\n"
    assert store.read("metrics.jsonl") == b"metrics.jsonl to 300\n"
    assert store.steps() == [100, 200, 300]
    (aside,) = stale.parent.glob(f"{stale.name}.aside-*")
    assert (aside / "metrics.jsonl").read_text() == "metrics.jsonl to 50\n"
    assert (aside / "checkpoints" / "50").is_dir()


def test_logs_of_another_history_are_set_aside_and_longer_ones_stay(url):
    first_machine(url, 200)
    with remote.mirrored(url) as folder:
        pass
    (folder / "metrics.jsonl").write_text("metrics.jsonl to 200\nand on\n")
    (folder / "goodput.jsonl").write_text("another\n")
    with remote.mirrored(url):
        assert (folder / "metrics.jsonl").read_text() == "metrics.jsonl to 200\nand on\n"
        assert (folder / "goodput.jsonl").read_text() == "goodput.jsonl to 200\n"
    (aside,) = folder.parent.glob(f"{folder.name}.aside-*")
    assert [p.read_text() for p in aside.iterdir()] == ["another\n"]


def test_what_could_not_be_copied_any_more_is_copied_now(url):
    store = first_machine(url, 200)
    with remote.mirrored(url) as folder:
        pass
    save(folder, 300)
    (folder / "metrics.jsonl").write_text("rewritten to 300\n")
    with remote.mirrored(url):
        assert store.steps() == [200, 300]
        assert store.read("metrics.jsonl") == b"rewritten to 300\n"


def test_logs_are_never_behind_a_complete_checkpoint(tmp_path, url, monkeypatch):
    store, folder = remote.Store(url), tmp_path / "run"
    save(folder, 100)
    (folder / "metrics.jsonl").write_text("to 100\n")
    monkeypatch.setattr(store, "send", lambda _: pytest.fail("first the rows"))
    with pytest.raises(BaseException, match="first the rows"):
        remote.Mirror(store, folder).sync()
    assert store.read("metrics.jsonl") == b"to 100\n"


@pytest.mark.parametrize("how", ["short", "missing"])
def test_a_checkpoint_damaged_there_costs_the_steps_since_the_one_before(url, how, capsys):
    store = first_machine(url, 100, 200, 300)
    part = store.path("checkpoints/300/state/part")
    if how == "short":
        store.fs.pipe_file(part, b"x")
    else:
        store.fs.rm_file(part)
    assert remote.fetched(url).name == "200"
    shutil.rmtree(remote.staging(url))
    with remote.mirrored(url) as folder:
        assert "300/state/part" in capsys.readouterr().err
        assert not (folder / "checkpoints" / "300").exists()
        save(folder, 300, text="again")
    shutil.rmtree(remote.staging(url))
    assert (remote.fetched(url) / "state" / "part").read_text() == "again300"


def test_a_store_of_damaged_checkpoints_alone_is_one_line(url):
    store = first_machine(url, 100, 200)
    for step in (100, 200):
        store.fs.pipe_file(store.path(f"checkpoints/{step}/state/part"), b"x")
    with pytest.raises(UserError, match="200/state/part: 1 bytes, not 4"):
        remote.fetched(url)


@pytest.mark.parametrize("lost", ["folder", "file", *ITEMS])
def test_a_checkpoint_that_goes_while_it_is_copied_is_none(tmp_path, url, monkeypatch, lost):
    store, folder = remote.Store(url), tmp_path / "run"
    save(folder, 4)
    step = folder / "checkpoints" / "4"
    real, doomed = store.fs.put_file, {"folder": step, "file": step / "state" / "part"}

    def put(local, *args, **kwargs):
        real(local, *args, **kwargs)
        victim = doomed.get(lost, step / lost)
        if victim.is_dir():
            shutil.rmtree(victim, ignore_errors=True)  # copies run side by side
        else:
            victim.unlink(missing_ok=True)

    monkeypatch.setattr(store.fs, "put_file", put)
    mirror = remote.Mirror(store, folder)
    mirror.sync()
    assert store.steps() == []
    monkeypatch.setattr(store.fs, "put_file", real)
    mirror.sync()
    assert store.folders() == ([] if lost == "folder" else [4])
    assert store.steps() == []


def test_an_empty_or_partial_folder_is_no_checkpoint(tmp_path, url, capsys):
    store, folder = remote.Store(url), tmp_path / "run"
    (folder / "checkpoints" / "4").mkdir(parents=True)
    save(folder, 8)
    shutil.rmtree(folder / "checkpoints" / "8" / "bundle")
    mirror = remote.Mirror(store, folder)
    mirror.sync()
    mirror.sync()
    assert store.steps() == []
    assert capsys.readouterr().err.count("lacks") == 2  # once for each


def test_the_newest_checkpoint_goes_first(tmp_path, url, monkeypatch):
    store, folder, order = remote.Store(url), tmp_path / "run", []
    save(folder, 4, 8, 12)
    real = store.send
    monkeypatch.setattr(store, "send", lambda path: (order.append(path.name), real(path))[1])
    remote.Mirror(store, folder).sync()
    assert order == ["12", "8", "4"]


def test_processes_that_fetch_one_address_at_once(url, monkeypatch):
    store = first_machine(url, 100, 200)
    meet, real = threading.Barrier(4), type(store.fs).get_file
    one = threading.Lock()  # threads share the position in a file of fsspec's memory

    def get(self, source, local, *args, **kwargs):
        if source.endswith("state/part"):
            meet.wait(30)  # all are in the middle of it
        with one:
            return real(self, source, local, *args, **kwargs)

    monkeypatch.setattr(type(store.fs), "get_file", get)
    found = []
    threads = [threading.Thread(target=lambda: found.append(remote.fetched(url))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [(p / "state" / "part").read_text() for p in found] == ["x200"] * 4
    assert [p.name for p in found[0].parent.iterdir()] == ["200"]


@pytest.mark.parametrize("steps", [(200,), (300,), (100,)])
def test_a_run_that_was_replaced_is_fetched_again(url, steps):
    store = first_machine(url, 200)
    assert (remote.fetched(url) / "state" / "part").read_text() == "x200"
    kept = remote.staging(url).rename(remote.staging(url).with_name("kept"))
    store.fs.rm(store.path(), recursive=True)
    with remote.mirrored(url) as folder:
        (folder / "config.json").write_text("{}")
        save(folder, *steps, text="y")
    shutil.rmtree(remote.staging(url))
    kept.rename(remote.staging(url))
    assert (remote.fetched(url) / "state" / "part").read_text() == f"y{steps[-1]}"


def test_a_copy_that_is_still_right_is_not_fetched_again(url, monkeypatch):
    first_machine(url, 200)
    remote.fetched(url)
    monkeypatch.setattr(remote.Store, "pull", lambda *_: pytest.fail("again"))
    assert remote.fetched(url).name == "200"


def test_every_marker_has_an_identity(url):
    store = first_machine(url, 100, 200)
    ids = {json.loads(store.marker(step) or b"")["id"] for step in (100, 200)}
    assert len(ids) == 2


def test_a_fine_tuned_run_reads_its_origin_from_the_store(url, monkeypatch):
    """``adopt`` gets the local folder, with ``origin.json`` in it, not the address as a path."""
    first_machine(url, 200)
    seen = []

    def adopt(experiment, directory):
        seen.append((directory, (directory / "origin.json").read_text()))
        raise UserError("far enough")

    monkeypatch.setattr(main.origin_lib, "adopt", adopt)
    experiment = config.Experiment(finetune=config.Finetune(init="gone"))
    with pytest.raises(UserError, match="far enough"):
        main.run(experiment, url)
    assert seen == [(remote.staging(url), "origin.json to 200\n")]
