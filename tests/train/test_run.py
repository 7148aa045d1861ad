# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from m2jax import config
from m2jax.bundle import load
from m2jax.checkpoint import manager
from m2jax.config import UserError
from m2jax.data.loader import make_loader
from m2jax.dist.mesh import make_mesh
from m2jax.obs.metrics import read_rows
from m2jax.train import loop as loop_lib
from m2jax.train import main, scoring
from m2jax.train import state as state_lib
from m2jax.train import step as step_lib
from m2jax.train.image_text import ImageTextTask
from m2jax.train.loop import Loop
from m2jax.train.step import accept, make_step
from tests.train import toy


def is_schedule(leaf):
    return isinstance(leaf, optax.ScaleByScheduleState)


def losses(workdir):
    return [
        (row["step"], row["loss"], row["grad_norm"]) for row in read_rows(workdir / "metrics.jsonl")
    ]


@pytest.mark.parametrize(
    "stop", [3, pytest.param(1, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_an_interrupted_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, monkeypatch, stop):
    cfg = toy.experiment(monkeypatch, augment=True)
    main.run(cfg, tmp_path / "whole")

    class Killed(Exception):
        pass

    real = main.Loop.log

    def log(self, step, *args):
        real(self, step, *args)
        if step == stop:
            self.checkpoints.wait()
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(main.Loop, "log", log)
        with pytest.raises(Killed):
            main.run(cfg, tmp_path / "cut")
    main.run(cfg, tmp_path / "cut")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    a, b = (load(tmp_path / name).params for name in ("cut", "whole"))
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.slow
def test_eight_devices_equal_one(monkeypatch):
    cfg = toy.experiment(monkeypatch, augment=True)
    found = []
    for spec, devices in ((config.Mesh(), 1), (config.Mesh(data=2, fsdp=2, model=2), 8)):
        mesh = make_mesh(spec, jax.devices()[:devices])
        task = ImageTextTask(cfg, mesh)
        step = make_step(cfg, task, mesh)
        state, loader = step.init(), make_loader(cfg, mesh)
        rows = []
        for _ in range(3):
            state, metrics = step.run(state, next(loader))
            rows.append([float(metrics["loss"]), float(metrics["grad_norm"])])
        loader.close()
        found.append(np.array(rows))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)


def test_the_state_is_sharded_as_the_rules_say(monkeypatch):
    cfg = toy.experiment(monkeypatch)
    mesh = make_mesh(config.Mesh(data=2, fsdp=2, model=2))
    step = make_step(cfg, ImageTextTask(cfg, mesh), mesh)
    state = step.init()
    kernel = state.params["backbone"]["blocks"]["A"]["fc1"]["kernel"]
    assert kernel.sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", "model")
    same_shape = [x for x in jax.tree.leaves(state.opt_state) if x.shape == kernel.shape]
    assert same_shape
    assert all(x.sharding.spec == kernel.sharding.spec for x in same_shape)


def test_the_guard_skips_what_is_not_finite_and_what_jumps():
    guard = config.Guard(factor=3.0, warmup_steps=5)
    state = type("S", (), {"step": jnp.int32(9), "norm_mean": jnp.float32(1.0)})
    assert bool(accept(guard, state, jnp.float32(1), jnp.float32(2)))
    assert not bool(accept(guard, state, jnp.float32(1), jnp.float32(4)))
    assert not bool(accept(guard, state, jnp.float32(np.nan), jnp.float32(1)))
    state.step = jnp.int32(2)
    assert bool(accept(guard, state, jnp.float32(1), jnp.float32(4)))


@pytest.mark.slow
def test_a_poisoned_step_changes_nothing_and_many_rewind_then_stop(tmp_path, monkeypatch):
    cfg = toy.experiment(monkeypatch, guard=config.Guard(patience=2, rewinds=1))
    real = ImageTextTask.loss

    def loss(self, params, batch, rng):
        value, metrics = real(self, params, batch, rng)
        step_is_late = (batch["text"].sum() > -1) & (params["logit_scale"] != 2.6593)
        return jnp.where(step_is_late, jnp.nan, value), metrics

    monkeypatch.setattr(ImageTextTask, "loss", loss)
    with pytest.raises(UserError, match="skipped by step"):
        main.run(cfg, tmp_path)
    assert all(np.isnan(row["loss"]) for row in read_rows(tmp_path / "metrics.jsonl"))


@pytest.mark.slow
def test_a_rewind_passes_over_checkpoints_that_the_spike_led_to(tmp_path, monkeypatch):
    """Steps 5, 6 and 7 are poisoned; 4 and 6 were saved: the run goes back to 2."""
    cfg = toy.experiment(monkeypatch, guard=config.Guard(patience=3))
    cfg = dataclasses.replace(cfg, checkpoint=config.Checkpoint(every=2, keep=9))
    real, went = main.Loop.one, []

    def one(self, step, state):
        state, metrics, batch = real(self, step, state)
        if step + 1 in (5, 6, 7):
            skipped = jnp.asarray(step - 3, jnp.int32)
            metrics = {**metrics, "skipped": skipped}
        return state, metrics, batch

    restore = main.Checkpoints.restore

    def watched(self, abstract, *, until=None):
        found = restore(self, abstract, until=until)
        went.append((until, found and found.step))
        return found

    monkeypatch.setattr(main.Loop, "one", one)
    monkeypatch.setattr(main.Checkpoints, "restore", watched)
    assert main.run(cfg, tmp_path) == 0
    assert went == [(None, None), (3, 2)]


def test_validation_rows_tell_of_the_steps_own_checkpoint(tmp_path, monkeypatch):
    cfg = toy.experiment(monkeypatch, log_every=8)
    best = config.Checkpoint(every=100, keep=1, best="zero_shot/x/top1")
    cfg = dataclasses.replace(cfg, eval=config.Eval(suite="emoji", every=4), checkpoint=best)
    asked, loaded = [], []

    def run_suite(model, *, suite, **others):
        asked.append(suite)
        beats.clear()
        model.encode_text(np.ones((1, 6), np.int32), np.ones((1, 6), np.bool_))
        model.preprocess([Image.new("RGB", (9, 9))])
        assert beats == [4 * len(asked) if suite != "emoji" else 8] * 2  # a long suite is no stall
        count = float(np.abs(model.params["text_embed"]).sum())
        figure = count - 100 * len(asked)  # the first is the best
        seen.append((figure, count))
        return scoring.Evaluation({"zero_shot/x/top1": figure, "baseline/chance/x/top1": 1.0}, [])

    seen, beats = [], []
    monkeypatch.setattr(scoring, "run_suite", run_suite)
    monkeypatch.setattr(scoring, "write_report", lambda *_: None)
    monkeypatch.setattr(scoring.emoji, "load", loaded.append)
    monkeypatch.setattr(main.Watchdog, "beat", lambda self, step: beats.append(step))
    main.run(cfg, tmp_path)
    assert loaded  # before the first step: a host without the data is found then
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert asked == ["emoji-validation", "emoji-validation", "emoji"]
    assert [row["step"] for row in rows] == [4, 8]
    assert all("baseline/chance/x/top1" not in row for row in rows)
    for row, (figure, count) in zip(rows, seen, strict=False):
        saved = load(tmp_path / "checkpoints" / str(row["step"])).params["text_embed"]
        assert count == float(np.abs(saved).sum())
        assert row["zero_shot/x/top1"] == figure
    assert (tmp_path / "checkpoints" / "best").read_text() == "4\n"  # with keep=1, kept as the best


def test_a_run_that_is_told_to_end_saves_and_does_not_score(tmp_path, monkeypatch):
    cfg = toy.experiment(monkeypatch, log_every=8)
    cfg = dataclasses.replace(cfg, eval=config.Eval(suite="emoji", every=4))
    monkeypatch.setattr(scoring.emoji, "load", lambda where: None)
    monkeypatch.setattr(scoring, "run_suite", lambda *_, **__: pytest.fail("scored"))
    monkeypatch.setattr(main.Preemption, "reached", lambda self, step: step == 4)
    assert main.run(cfg, tmp_path) == main.PREEMPTED
    assert (tmp_path / "checkpoints" / "4").is_dir()


def test_a_suite_that_could_not_run_at_the_end_is_refused_at_the_start(tmp_path, monkeypatch):
    cfg = toy.experiment(monkeypatch)
    for suite, match in (("emojis", "eval.suite emojis: no such"), ("vqa", "vqa: scores a")):
        with pytest.raises(UserError, match=match):
            main.run(dataclasses.replace(cfg, eval=config.Eval(suite=suite)), tmp_path)
    spoken = dataclasses.replace(cfg.data, languages=("en", "fr"))
    scored = dataclasses.replace(cfg, data=spoken, eval=config.Eval(suite="emoji"))
    with pytest.raises(UserError, match=r"data\.languages has fr: set eval\.suite to ''"):
        main.run(scored, tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("every", [0, 4])
def test_a_best_that_nothing_measures_is_refused_early(tmp_path, monkeypatch, every):
    cfg = toy.experiment(monkeypatch, log_every=8)
    cfg = dataclasses.replace(
        cfg,
        eval=config.Eval(suite="", every=every),
        checkpoint=config.Checkpoint(every=100, best="zero_shot/x/top1"),
    )
    with pytest.raises(UserError, match=r"no such figure: use one of .*loss"):
        main.run(cfg, tmp_path)
    assert read_rows(tmp_path / "metrics.jsonl") == []  # before the first row


@pytest.mark.slow
def test_a_start_that_fails_leaves_the_runs_config_alone(tmp_path, monkeypatch):
    cfg = toy.experiment(monkeypatch, steps=2)
    main.run(cfg, tmp_path)
    before = (tmp_path / "config.json").read_text()
    longer = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, steps=3))
    broken = dataclasses.replace(longer, data=dataclasses.replace(cfg.data, name="nothing"))
    with pytest.raises(UserError):
        main.run(broken, tmp_path)
    assert (tmp_path / "config.json").read_text() == before
    main.run(longer, tmp_path)
    assert config.from_json((tmp_path / "config.json").read_text()).train.steps == 3


def test_a_skipped_step_keeps_every_parameter_and_moment_and_the_next_one_goes_on(monkeypatch):
    cfg = toy.experiment(monkeypatch)
    real = ImageTextTask.loss

    def loss(self, params, batch, rng):
        value, metrics = real(self, params, batch, rng)
        return jnp.where(batch["concept"][0] < 0, jnp.nan, value), metrics

    monkeypatch.setattr(ImageTextTask, "loss", loss)
    mesh = make_mesh(config.Mesh(), jax.devices()[:1])
    step = make_step(cfg, ImageTextTask(cfg, mesh), mesh)
    good = toy.ToySource(cfg).batch(0, slice(None))
    bad = {**good, "concept": np.full(16, -1, np.int32)}

    state, _ = step.run(step.init(), good)
    before = jax.tree.map(np.array, state)
    state, metrics = step.run(state, bad)
    after = jax.tree.map(np.array, state)
    assert (int(metrics["skipped"]), int(after.step)) == (1, 2)
    for part in ("params", "opt_state", "norm_mean"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, part), getattr(before, part))
    state, metrics = step.run(state, good)
    assert int(metrics["skipped"]) == 0
    moved = jax.tree.map(lambda a, b: bool((np.asarray(a) != b).any()), state.params, after.params)
    assert any(jax.tree.leaves(moved))
    # The schedule stands where the run does, not at the number of updates.
    leaves = jax.tree.leaves(state.opt_state, is_leaf=is_schedule)
    counts = {int(leaf.count) for leaf in leaves if is_schedule(leaf)}
    assert counts == {3}


@pytest.mark.slow
def test_rows_past_the_restored_step_and_torn_lines_are_dropped(tmp_path, monkeypatch):
    cfg = toy.experiment(monkeypatch)
    main.run(dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, steps=3)), tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 5, "loss": 1.0}) + '\n{"step": 6, "lo')
    main.run(cfg, tmp_path)
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == list(range(1, 9))


def test_another_architecture_is_refused(tmp_path, monkeypatch):
    cfg = toy.experiment(monkeypatch)
    main.run(cfg, tmp_path)
    other = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, width=32))
    with pytest.raises(UserError, match=r"model\.width is 16 there and 32"):
        main.run(other, tmp_path)


def test_load_refuses_what_is_no_model(tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        load(tmp_path / "nothing")
    with pytest.raises(UserError, match="no checkpoint"):
        load(tmp_path)


def test_damaged_checkpoints_are_one_line(tmp_path, monkeypatch):
    cfg = toy.experiment(monkeypatch)
    main.run(cfg, tmp_path)
    for file in manager.folder(tmp_path).glob("*/state/**/*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError) as caught:
        main.run(cfg, tmp_path)
    assert "\n" not in str(caught.value)


def test_the_bundle_encodes_like_the_trained_model(tmp_path, monkeypatch):
    cfg = toy.experiment(monkeypatch)
    main.run(cfg, tmp_path)
    bundle = load(tmp_path)
    tokens = bundle.tokenize(["word1", ""])
    text = bundle.encode_text(tokens.ids, tokens.mask)
    image = bundle.encode_image(np.zeros((3, 16, 16, 3), np.float32))
    np.testing.assert_allclose(np.linalg.norm(text, axis=1), 1, rtol=1e-5)
    assert bundle.logits(image, text).shape == (3, 2)


def test_scales_stop_at_their_ceiling(monkeypatch):
    cfg = toy.experiment(monkeypatch)
    task = ImageTextTask(cfg)
    params = task.after_update({"logit_scale": jnp.float32(9), "logit_vl_scale": jnp.float32(1)})
    np.testing.assert_allclose(params["logit_scale"], np.log(100), rtol=1e-6)
    assert params["logit_vl_scale"] == 1


def test_the_host_stays_within_two_steps_of_the_devices(tmp_path, monkeypatch):
    cfg = toy.experiment(monkeypatch, steps=8, log_every=8)
    waited, dispatched = [], []
    block = jax.block_until_ready

    def watched(tree):
        if isinstance(tree, dict) and "skipped" in tree:
            waited.append(len(dispatched))
        return block(tree)

    one = Loop.one

    def counted(self, step, state):
        found = one(self, step, state)
        dispatched.append(step)
        return found

    monkeypatch.setattr(loop_lib.jax, "block_until_ready", watched)
    monkeypatch.setattr(Loop, "one", counted)
    cfg = dataclasses.replace(cfg, checkpoint=config.Checkpoint(every=8))
    main.run(cfg, tmp_path)
    assert waited[:6] == [2, 3, 4, 5, 6, 7]  # before each step from the third on


def test_the_average_is_kept_in_float32():
    params = {"a": jnp.ones(3, jnp.bfloat16)}
    state = state_lib.fresh(params, (), 0, ema=True)
    assert state.ema["a"].dtype == jnp.float32
    for _ in range(3):
        mean = step_lib._average(0.999, state, {"a": jnp.full(3, 1.01, jnp.bfloat16)})
        assert mean["a"].dtype == jnp.float32
        state = dataclasses.replace(state, ema=mean)
    assert state_lib.fresh({"a": jnp.ones(3)}, (), 0, ema=True).ema["a"].dtype == jnp.float32
