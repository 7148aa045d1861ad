# SPDX-License-Identifier: Apache-2.0
"""A checkpoint in parts is complete when every process has copied its own, and not before."""

import itertools
import json
import uuid

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from m2jax.checkpoint import parts, remote
from m2jax.checkpoint import store as store_lib
from m2jax.checkpoint.manager import Checkpoints
from m2jax.checkpoint.store import DamagedError
from m2jax.config import UserError
from tests.checkpoint.test_manager import ASSETS, EXPERIMENT, state, target

COMMON = ("state/_METADATA", "state/a/.zarray", "data/metadata", "bundle/metadata")


@pytest.fixture
def url():
    """An address in memory."""
    return f"memory://{uuid.uuid4().hex}/run"


class Processes:
    """Two processes of a run, each with a folder; one of them at a time is this one."""

    def __init__(self, monkeypatch, tmp_path, url, attempt="one"):
        self._patch, self.store = monkeypatch, remote.Store(url)
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        self.folders = [tmp_path / f"{attempt}-{index}" for index in range(2)]
        for folder in self.folders:
            folder.mkdir()
        self.mirrors = [parts.PartMirror(self.store, f, attempt) for f in self.folders]

    def save(self, step):
        """Each writes what is common, and a shard of its own."""
        for index, folder in enumerate(self.folders):
            for name in (*COMMON, f"state/a/{index}.0"):
                file = folder / "checkpoints" / str(step) / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(b"x" * (step + index))

    def sync(self, index):
        """A pass of one of them."""
        self._patch.setattr(jax, "process_index", lambda: index)
        self.mirrors[index].sync()


@pytest.mark.parametrize("order", [(0, 1, 0), (1, 0)])
def test_the_last_part_makes_a_checkpoint_complete(monkeypatch, tmp_path, url, order):
    run = Processes(monkeypatch, tmp_path, url)
    run.save(4)
    for index in order[:-1]:
        run.sync(index)
        assert run.store.steps() == []
    run.sync(order[-1])
    assert run.store.steps() == [4]
    assert run.store.listed(4) == {
        **dict.fromkeys(COMMON, 4),
        "state/a/0.0": 4,
        "state/a/1.0": 5,
    }


@pytest.mark.parametrize("broken", range(2))
def test_a_part_that_fails_leaves_no_checkpoint(monkeypatch, tmp_path, url, broken):
    run = Processes(monkeypatch, tmp_path, url)
    run.save(4)
    done, fs = [], run.store.fs

    def failing(real):
        def write(*args, **kwargs):
            done.append(args)
            if len(done) == broken + 1:
                raise OSError("the connection broke")
            return real(*args, **kwargs)

        return write

    with monkeypatch.context() as patch:
        for name in ("put_file", "pipe_file"):
            patch.setattr(fs, name, failing(getattr(fs, name)))
        with pytest.raises(UserError, match="the connection broke"):
            run.sync(1)
    run.sync(0)
    assert run.store.steps() == []
    run.sync(1)
    run.sync(0)
    assert run.store.steps() == [4]


def test_parts_of_another_attempt_do_not_count(monkeypatch, tmp_path, url):
    before = Processes(monkeypatch, tmp_path, url, "before")
    before.save(4)
    before.sync(1)
    now = Processes(monkeypatch, tmp_path, url, "now")
    now.save(4)
    now.sync(0)
    assert now.store.steps() == []
    now.sync(1)
    now.sync(0)
    assert now.store.steps() == [4]


def test_a_step_made_again_waits_until_the_old_one_is_unmarked(monkeypatch, tmp_path, url):
    before = Processes(monkeypatch, tmp_path, url, "before")
    before.save(4)
    for index in (1, 0):
        before.sync(index)
    old = before.store.marker(4)
    now = Processes(monkeypatch, tmp_path, url, "now")
    now.save(4)
    (now.folders[1] / "checkpoints" / "4" / "state" / "a" / "1.0").write_bytes(b"another")
    now.sync(1)
    assert now.store.marker(4) == old  # and its files are still its own
    assert now.store.fs.cat_file(now.store.path("checkpoints", "4", "state/a/1.0")) == b"x" * 5
    for index in (0, 1, 0):
        now.sync(index)
    assert now.store.listed(4)["state/a/1.0"] == 7


def test_a_part_that_goes_while_it_is_copied_is_none(monkeypatch, tmp_path, url):
    run = Processes(monkeypatch, tmp_path, url)
    run.save(4)
    real, file = run.store.put, run.folders[1] / "checkpoints" / "4" / "state" / "a" / "1.0"
    monkeypatch.setattr(run.store, "put", lambda *where: (file.unlink(), real(*where)))
    run.sync(1)
    monkeypatch.setattr(run.store, "put", real)
    run.sync(0)
    assert run.store.steps() == []


def test_what_a_run_keeps_no_longer_goes_there_too(monkeypatch, tmp_path, url):
    run = Processes(monkeypatch, tmp_path, url)
    for step in (4, 8):
        run.save(step)
    run.sync(1)
    run.sync(0)
    assert run.store.steps() == [4, 8]
    for folder in run.folders:
        for file in sorted((folder / "checkpoints" / "4").rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        (folder / "checkpoints" / "4").rmdir()
    run.sync(1)
    run.sync(0)
    assert run.store.folders() == [8]


def parts_of(monkeypatch, url, folder):
    """The parts of a run as its first process sees them, alone."""
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    with monkeypatch.context() as patch:
        patch.setattr(jax, "process_count", lambda: 1)
        return parts.Parts(url, folder)


def test_a_damaged_checkpoint_stays_there_until_it_is_made_again(monkeypatch, tmp_path, url):
    run = Processes(monkeypatch, tmp_path, url)
    run.save(4)
    for index in (1, 0):
        run.sync(index)
    found = parts_of(monkeypatch, url, tmp_path / "next")
    found.mirror.sync()
    found.set_aside([4])
    (found.directory / "checkpoints" / "4").rename(found.directory / "checkpoints" / "4.damaged")
    found.mirror.sync()
    assert run.store.steps() == []
    assert run.store.folders() == [4]  # it may be all there is


def test_a_damaged_checkpoint_made_again_is_copied_again(monkeypatch, tmp_path, url):
    """By the other processes too, or it would never be complete again."""
    run = Processes(monkeypatch, tmp_path, url)
    run.save(4)
    for process in (1, 0):
        run.sync(process)
    found = parts_of(monkeypatch, url, tmp_path / "next")
    found.set_aside([4])
    folder = found.directory / "checkpoints" / "4"
    folder.rename(folder.with_name("4.damaged"))
    found.forget([4])
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    run.folders[1] = found.directory
    run.save(4)
    sent = []
    monkeypatch.setattr(type(found.mirror), "_push", lambda self, step: sent.append(step))
    found.mirror.sync()
    assert sent == [4]


def test_a_store_that_does_not_answer_is_no_damage(monkeypatch, tmp_path, url):
    run = Processes(monkeypatch, tmp_path, url)
    run.save(4)
    for index in (1, 0):
        run.sync(index)
    found = parts_of(monkeypatch, url, tmp_path / "next")

    def fail(*_):
        raise ConnectionError("no route")

    monkeypatch.setattr(type(run.store.fs), "get_file", fail)
    with pytest.raises(UserError, match="could not be read") as caught:
        found.bring(4, {})
    assert not isinstance(caught.value, DamagedError)
    monkeypatch.undo()
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    run.store.fs.rm_file(run.store.path("checkpoints", "4", "state/_METADATA"))
    with pytest.raises(DamagedError, match="missing"):
        found.bring(4, {})


@pytest.mark.parametrize("marker", [b'{"files": {}}', b"", b"[", b'{"files": {"../x": 1}}'])
def test_a_marker_that_says_nothing_costs_its_step_alone(
    monkeypatch, tmp_path, url, capsys, marker
):
    before = parts_of(monkeypatch, url, tmp_path / "before")
    checkpoints = Checkpoints(before.directory, EXPERIMENT, ASSETS, parts=before)
    for step in (4, 8):
        checkpoints.save(step, state(step), {"next_index": step})
    checkpoints.wait()
    before.mirror.sync()
    store = remote.Store(url)
    assert store.steps() == [4, 8]
    store.fs.pipe_file(store.path("checkpoints", "8", store_lib.MARKER), marker)
    now = parts_of(monkeypatch, url, tmp_path / "now")
    restored = Checkpoints(now.directory, EXPERIMENT, ASSETS, parts=now).restore(target(state(0)))
    assert restored.step == 4
    np.testing.assert_array_equal(restored.state["x"], state(4)["x"])
    assert store.steps() == [4]
    assert remote.noted(now.directory, 8) is None  # it is copied when the run makes it again
    assert ("goes on from step 4" in capsys.readouterr().err) == bool(marker)


AXES = st.sampled_from([None, "x", "y", ("x", "y")])


@given(
    blocks=st.lists(st.sampled_from([1, 2, 3]), min_size=0, max_size=2),
    specs=st.lists(AXES, min_size=2, max_size=2),
    chunk=st.lists(st.sampled_from([1, 2, 3, 5]), min_size=2, max_size=2),
    mine=st.integers(0, 7),
)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_process_takes_the_files_of_its_shards_and_no_others(
    tmp_path_factory, monkeypatch, blocks, specs, chunk, mine
):
    specs = specs[: len(blocks)]
    named = [axis for spec in specs if spec for axis in np.atleast_1d(spec)]
    if len(set(named)) < len(named):
        return  # an axis is used once
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("x", "y"))
    shape = tuple(8 * block for block in blocks)
    sharding = NamedSharding(mesh, PartitionSpec(*specs))
    device = jax.devices()[mine]
    place = sharding.devices_indices_map(shape)[device]

    class Mine:
        """A sharding of which this process holds one device."""

        def addressable_devices_indices_map(self, _):
            return {device: place}

    folder = tmp_path_factory.mktemp("grid")
    (folder / "state" / "a.b").mkdir(parents=True)
    sides = chunk[: len(shape)]
    described = {"shape": shape, "chunks": sides, "dimension_separator": "."}
    (folder / "state" / "a.b" / ".zarray").write_text(json.dumps(described))
    leaf = type("Leaf", (), {"shape": shape, "sharding": Mine()})()
    found = parts.chunks(folder, {"state/a.b"}, {"a": {"b": leaf}})

    taken = np.zeros(shape, bool)
    taken[place] = True
    expected = set()
    grid = [range(-(-size // side)) for size, side in zip(shape, sides, strict=True)]
    for number in itertools.product(*grid):
        begin = [n * side for n, side in zip(number, sides, strict=True)]
        here = tuple(slice(b, b + side) for b, side in zip(begin, sides, strict=True))
        if taken[here].any():
            expected.add(f"state/a.b/{'.'.join(map(str, number)) or '0'}")
    assert found == expected


@pytest.mark.parametrize(
    "text", ["", "[]", '{"shape": [4], "chunks": [0], "dimension_separator": "."}', "{" * 5000]
)
def test_a_damaged_description_is_one_line(tmp_path, text):
    (tmp_path / "state" / "a").mkdir(parents=True)
    (tmp_path / "state" / "a" / ".zarray").write_text(text)
    leaf = jax.ShapeDtypeStruct(
        (4,), np.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
    )
    with pytest.raises(UserError, match="does not describe an array"):
        parts.chunks(tmp_path, {"state/a"}, {"a": leaf})
