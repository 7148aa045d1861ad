# SPDX-License-Identifier: Apache-2.0
"""What stays, what is taken when the newest is damaged, and what can be read alone."""

import dataclasses
import shutil
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils

from m2jax import config
from m2jax.checkpoint import late_reads, manager
from m2jax.checkpoint.manager import Checkpoints, read_params
from m2jax.checkpoint.retention import goodness
from m2jax.config import UserError
from m2jax.dist.mesh import make_mesh
from m2jax.dist.sharding import batch_sharding, replicated

ASSETS = {"tokenizer": None, "preprocess": {}}
EXPERIMENT = config.Experiment(model=config.resolve(config.Model()))


def state(step):
    return {"step": jnp.int32(step), "x": jnp.arange(4096.0) + step}


def target(tree):
    """What a tree is restored onto: its shapes, over two devices where they divide."""
    mesh = make_mesh(config.Mesh(), jax.devices()[:2])

    def place(x):
        where = batch_sharding(mesh) if x.ndim else replicated(mesh)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    return jax.tree.map(place, tree)


def folders(workdir):
    return sorted(p.name for p in (workdir / "checkpoints").iterdir() if p.is_dir())


def saved(workdir, steps, metrics=None, *, later=False, **cfg):
    """A work directory with a checkpoint of each step; what ``Checkpoints`` gives for it.

    With ``later``, losses become known only after their checkpoint.
    """
    experiment = dataclasses.replace(EXPERIMENT, checkpoint=config.Checkpoint(**cfg))
    checkpoints = Checkpoints(workdir, experiment, ASSETS)
    for step in steps:
        found = None if metrics is None else {"loss": metrics[step]}
        at_once = None if later else found
        checkpoints.save(step, state(step), {"next_index": step}, metrics=at_once)
        if later and found is not None and step % 2 == 0:  # an evaluation at every second one
            checkpoints.wait()
            checkpoints.score(step, found)
    checkpoints.wait()
    return checkpoints


def test_a_save_does_not_tell_the_preemption_service_where_the_run_is(tmp_path, monkeypatch):
    """It is behind the run by then; see ``orbax_manager.Manager``."""
    asked = []
    monkeypatch.setattr(
        multihost_utils, "reached_preemption_sync_point", lambda step: asked.append(step) or False
    )
    saved(tmp_path, (1, 2)).close()
    assert folders(tmp_path) == ["1", "2"]
    assert asked == []


def test_newest_milestones_and_the_best_stay(tmp_path):
    losses = {1: 5.0, 2: 1.0, 3: 4.0, 4: 3.0, 5: float("nan"), 6: 2.0, 7: 9.0, 8: 9.0}
    saved(tmp_path, range(1, 9), losses, keep=2, keep_every=3, best="-loss").close()
    assert folders(tmp_path) == ["2", "3", "6", "7", "8"]
    assert (tmp_path / "checkpoints" / "best").read_text() == "2\n"
    saved(tmp_path, (9, 10), {9: 0.5, 10: 0.7}, keep=2, keep_every=3, best="-loss").close()
    assert folders(tmp_path) == ["10", "3", "6", "9"]  # a later process of the run knows the best
    assert (tmp_path / "checkpoints" / "best").read_text() == "9\n"


def test_figures_that_come_after_the_save_choose_the_best_too(tmp_path):
    losses = {1: 0.0, 2: 3.0, 3: 0.0, 4: 2.0, 5: 0.0, 6: 9.0, 7: 0.0}  # odd ones nobody asks for
    choice = {"keep": 1, "best": "-loss", "later": True}
    saved(tmp_path, range(1, 8), losses, **choice).close()
    assert folders(tmp_path) == ["4", "7"]
    assert (tmp_path / "checkpoints" / "best").read_text() == "4\n"
    saved(tmp_path, (8, 9), {8: 1.0, 9: 0.0}, **choice).close()
    assert folders(tmp_path) == ["8", "9"]


def test_damaged_scores_are_one_line(tmp_path):
    saved(tmp_path, (1,), {1: 1.0}, best="loss").close()
    (tmp_path / "checkpoints" / "scores.json").write_text("[1")
    with pytest.raises(UserError, match=r"scores\.json: damaged .* remove it"):
        saved(tmp_path, (), best="loss")


def test_the_best_may_be_the_greatest():
    assert np.isnan(goodness("los", {"loss": 2.0}))
    assert goodness("loss", {"loss": 2.0}) == 2.0
    assert goodness("-loss", {"loss": 2.0}) == -2.0
    assert goodness("loss", {"loss": float("nan")}) == goodness("-loss", {"loss": float("nan")})


def test_knobs_out_of_range_and_unknown_metrics_are_refused(tmp_path):
    for key in ("every", "keep"):
        with pytest.raises(UserError, match=rf"checkpoint\.{key}=0"):
            saved(tmp_path, (), **{key: 0})
    with pytest.raises(UserError, match=r"best='-los': no such figure: use one of loss"):
        saved(tmp_path, (1,), {1: 1.0}, best="-los")
    assert folders(tmp_path) == []


def shorten(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file):
    """Changes one bit in the middle."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("item", "damage"),
    [
        ("state", shorten),
        ("state", flip),
        ("state", Path.unlink),
        ("data", shorten),
        ("bundle", shorten),
        ("bundle", Path.unlink),
    ],
)
def test_a_damaged_newest_falls_back_and_its_step_is_saved_again(tmp_path, capsys, item, damage):
    saved(tmp_path, (1, 2, 3)).close()
    for file in (tmp_path / "checkpoints" / "3" / item).rglob("*"):
        if file.is_file():
            damage(file)
    checkpoints = Checkpoints(tmp_path, EXPERIMENT, ASSETS)
    restored = checkpoints.restore(target(state(0)))
    assert restored is not None
    assert (restored.step, restored.data) == (2, {"next_index": 2})
    np.testing.assert_array_equal(restored.state["x"], state(2)["x"])
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "checkpoints/3: damaged" in line
    assert "goes on from step 2" in line
    checkpoints.save(3, state(3), {"next_index": 3})
    checkpoints.close()
    assert folders(tmp_path) == ["2", "3", "3.damaged"]
    again = Checkpoints(tmp_path, EXPERIMENT, ASSETS).restore(target(state(0)))
    assert again is not None
    assert again.step == 3


def test_when_none_can_be_read_nothing_is_moved(tmp_path):
    saved(tmp_path, (1, 2), keep=2).close()
    for file in (tmp_path / "checkpoints").glob("*/state/**/*"):
        if file.is_file():
            shorten(file)
    checkpoints = Checkpoints(tmp_path, EXPERIMENT, ASSETS)
    for _ in range(2):  # a second try does not begin from nothing
        with pytest.raises(UserError, match="checkpoints/2: cannot be restored") as caught:
            checkpoints.restore(target(state(0)))
        assert "\n" not in str(caught.value)
    assert folders(tmp_path) == ["1", "2"]


def test_another_shape_is_no_damage(tmp_path):
    saved(tmp_path, (1,)).close()
    checkpoints = Checkpoints(tmp_path, EXPERIMENT, ASSETS)
    with pytest.raises(UserError, match="cannot be restored"):
        checkpoints.restore(target(state(0) | {"x": np.zeros(8, np.float32)}))
    assert folders(tmp_path) == ["1"]


def test_reads_that_outlive_a_failed_restore_are_not_heard_of(tmp_path, monkeypatch):
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", heard.append)
    late_reads.silence_late_reads.__wrapped__()
    late = RuntimeError("Event loop is closed")
    for error in (late, RuntimeError("something else"), ValueError("Event loop is closed")):
        sys.unraisablehook(types.SimpleNamespace(exc_value=error, object=None))
    assert [repr(it.exc_value) for it in heard] == [
        "RuntimeError('something else')",
        "ValueError('Event loop is closed')",
    ]


def test_a_half_written_checkpoint_is_cleared_away(tmp_path):
    saved(tmp_path, (1, 2), keep=2).close()
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "2", folder / "3.orbax-checkpoint-tmp")
    checkpoints = Checkpoints(tmp_path, EXPERIMENT, ASSETS)
    restored = checkpoints.restore(target(state(0)))
    assert restored is not None
    assert restored.step == 2
    checkpoints.save(3, state(3), {})  # waits for the clearing, which goes on beside the run
    checkpoints.close()
    assert folders(tmp_path) == ["2", "3"]


@pytest.mark.parametrize("averaged", [False, True])
def test_one_tower_alone_can_be_read(tmp_path, averaged):
    towers = {"vision": {"kernel": jnp.ones((8, 4))}, "text": {"kernel": jnp.zeros((8, 4))}}
    ema = jax.tree.map(lambda x: x + 1, towers) if averaged else None
    checkpoints = Checkpoints(tmp_path, EXPERIMENT, ASSETS)
    checkpoints.save(1, {"params": towers, "ema": ema, "step": jnp.int32(1)}, {})
    checkpoints.close()
    found = read_params(manager.newest(tmp_path), target({"vision": towers["vision"]}))
    assert list(found) == ["vision"]
    np.testing.assert_array_equal(found["vision"]["kernel"], np.full((8, 4), 1 + averaged))
