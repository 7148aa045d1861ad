# SPDX-License-Identifier: Apache-2.0
"""A visual tokenizer: nearest words, its objective, its run, and the run that tells its tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2jax import config
from m2jax.bundle import load
from m2jax.checkpoint import manager
from m2jax.config import UserError
from m2jax.dist.mesh import make_mesh
from m2jax.losses import masked as masked_lib
from m2jax.models import params as params_lib
from m2jax.obs.metrics import read_rows
from m2jax.train import main
from m2jax.train.m2_objectives import M2Task
from m2jax.train.visual_tokenizer import VisualTokenizerTask, read_tokenizer
from tests.train import test_m2_objectives as m2
from tests.train import toy

KEY = "visual_tokenizer"


def experiment(monkeypatch, *, steps=12, init="", **tokenizer):
    base = toy.experiment(monkeypatch, steps=steps)
    cfg = dataclasses.replace(m2.TOKENIZER, **{"weight": 1.0, **tokenizer})
    dtype = "float64" if jax.config.jax_enable_x64 else "float32"
    model = dataclasses.replace(base.model, patch_size=4, dtype=dtype, param_dtype=dtype)
    return dataclasses.replace(
        base,
        model=model,
        loss=config.Loss(visual_tokenizer=cfg),
        optim=config.Optim(learning_rate=1e-2, warmup_steps=2),
        finetune=config.Finetune(init=init),
    )


@pytest.fixture
def one_batch(monkeypatch):
    """Runs see the same batch again and again; its ids are pieces of the tokenizer."""
    real = toy.ToySource.batch

    def batch(self, _, rows):
        found = real(self, 0, rows)
        return {**found, "text": found["text"] % self.tokenizer.vocab_size}

    monkeypatch.setattr(toy.ToySource, "batch", batch)


@pytest.fixture
def wide():
    with jax.enable_x64(True):
        yield


def test_tokens_are_the_nearest_words_and_the_loss_is_of_what_the_decoder_makes_of_them(
    wide, monkeypatch
):
    cfg = experiment(monkeypatch, commitment=0.25)
    task = VisualTokenizerTask(cfg)
    params = jax.jit(task.init)(jax.random.key(0))
    batch = jax.tree.map(jnp.asarray, toy.ToySource(cfg).batch(0, slice(None)))
    rgba = np.asarray(batch["image"])[:, 0] / 255
    pixels = jnp.asarray(rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:])

    def told(params, pixels):
        tokenizer = params_lib.bind(task.tokenizer.graph, params[KEY])
        found = tokenizer.quantise(pixels)
        return found, tokenizer.decode(found.words)

    found, out = jax.jit(told)(params, pixels)
    ids, codes, words = map(np.asarray, found)
    book = np.asarray(params[KEY]["codebook"]["embed"])
    book = book / np.linalg.norm(book, axis=1, keepdims=True)
    np.testing.assert_allclose(np.linalg.norm(codes, axis=-1), 1, rtol=1e-12)
    distance = ((codes[:, :, None] - book) ** 2).sum(-1)
    np.testing.assert_array_equal(ids, distance.argmin(-1))
    assert ids.shape == (16, 16)
    np.testing.assert_allclose(words, book[ids], rtol=1e-12)
    target = np.asarray(masked_lib.patch_targets(pixels, 4))
    cosine = (np.asarray(out) * target).sum(-1)
    cosine /= np.linalg.norm(out, axis=-1) * np.linalg.norm(target, axis=-1)
    gap = distance.min(-1).mean()
    loss = jax.jit(jax.value_and_grad(task.loss, has_aux=True))
    (value, metrics), grads = loss(params, batch, jax.random.key(3))
    np.testing.assert_allclose(value, 1 - cosine.mean() + 0.25 * 2 * gap, rtol=1e-7)
    np.testing.assert_allclose(metrics["tokenizer/words_in_use"], len(np.unique(ids)) / 32)
    check_decoder_gradient(loss, params, batch, grads)
    for name in ("patch_in", "code", "codebook"):  # through the rounding
        assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads[KEY][name])), name


def check_decoder_gradient(loss, params, batch, grads):
    """Behind the rounding, where the gradient is that of the function, against differences."""
    rng = np.random.default_rng(0)
    behind = ("word_in", "positions", "decoder", "decoder_norm", "out")
    direction = {
        name: jax.tree.map(lambda x, on=name in behind: on * rng.normal(size=x.shape), part)
        for name, part in params[KEY].items()
    }
    moved = []
    for sign in (1, -1):
        there = jax.tree.map(lambda p, d, s=sign: p + s * 1e-6 * d, params[KEY], direction)
        moved.append(loss({KEY: there}, batch, jax.random.key(3))[0][0])
    along = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).sum(), grads[KEY], direction)))
    np.testing.assert_allclose((moved[0] - moved[1]) / 2e-6, along, rtol=2e-5)


def test_a_token_belongs_to_its_patch_and_knows_where_that_lies(wide, monkeypatch):
    """Row by row, as the patches of the encoder that has to tell the tokens."""
    task = VisualTokenizerTask(experiment(monkeypatch))
    params = jax.jit(task.init)(jax.random.key(0))

    def run(params, pixels):
        tokenizer = params_lib.bind(task.tokenizer.graph, params[KEY])
        codes = tokenizer.quantise(pixels).codes
        return codes, tokenizer.decode(jnp.broadcast_to(codes[:, :1], codes.shape))

    run = jax.jit(run)
    grey = np.full((1, 16, 16, 3), 0.5)
    codes, told = map(np.asarray, run(params, jnp.asarray(grey)))
    for states in (codes, told):  # all patches alike, all words alike
        apart = np.linalg.norm(states[0][:, None] - states[0], axis=-1)
        assert apart[~np.eye(16, dtype=bool)].min() > 1e-3
    for place in (1, 6, 8):
        row, column = divmod(place, 4)
        one = grey.copy()
        one[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = (1.0, 0.0, 0.0)
        moved = np.linalg.norm(np.asarray(run(params, jnp.asarray(one))[0]) - codes, axis=-1)
        assert moved[0].argmax() == place


def test_what_does_not_go_together_is_said(monkeypatch):
    cfg = experiment(monkeypatch, target="features")
    with pytest.raises(UserError, match="no model to learn from: name one with --init"):
        VisualTokenizerTask(cfg)
    with pytest.raises(UserError, match=r"has no encoder: set finetune.init to ''"):
        VisualTokenizerTask(experiment(monkeypatch, init="somewhere"))
    scored = dataclasses.replace(experiment(monkeypatch), eval=config.Eval(suite="emoji"))
    with pytest.raises(UserError, match=r"has no encoder: set eval.suite to ''"):
        VisualTokenizerTask(scored)
    with pytest.raises(UserError, match="width=10: not a multiple of heads=4: change one"):
        VisualTokenizerTask(experiment(monkeypatch, width=10, heads=4))


def test_a_run_without_a_trained_tokenizer_is_refused(monkeypatch, tmp_path):
    cfg = m2.experiment(monkeypatch)
    mesh = make_mesh(config.Mesh(), jax.devices()[:1])
    tokenizer = M2Task(cfg).tokenizer
    for name, message in (
        ("", "tokenizer='': CMIM needs a trained visual tokenizer: train one"),
        (str(tmp_path / "no"), "no: no such directory: name a work directory"),
    ):
        named = dataclasses.replace(cfg.loss.masked_tokens, tokenizer=name)
        loss = dataclasses.replace(cfg.loss, masked_tokens=named)
        with pytest.raises(UserError, match=message):
            read_tokenizer(dataclasses.replace(cfg, loss=loss), tokenizer, mesh)


def named(monkeypatch, folder, *, tokenizer=None, **options):
    cfg = m2.experiment(monkeypatch, masked_tokens={"tokenizer": str(folder)}, **options)
    own = dataclasses.replace(cfg.loss.visual_tokenizer, **(tokenizer or {}))
    return dataclasses.replace(cfg, loss=dataclasses.replace(cfg.loss, visual_tokenizer=own))


@pytest.mark.slow
def test_a_tokenizer_is_trained_then_told_and_stays_as_it_was(tmp_path, monkeypatch, one_batch):
    first, second = tmp_path / "tokenizer", tmp_path / "run"
    main.run(experiment(monkeypatch, steps=40), first)
    rows = read_rows(first / "metrics.jsonl")
    assert rows[-1]["tokenizer/cosine"] > rows[0]["tokenizer/cosine"] + 0.05
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.05
    cfg = named(monkeypatch, first, steps=12)
    main.run(cfg, second)
    rows = read_rows(second / "metrics.jsonl")
    for name in ("loss/masked_text", "loss/masked_tokens", "loss/vl"):
        assert rows[-1][name] < rows[0][name], name
    mesh = make_mesh(config.Mesh(), jax.devices()[:1])
    task = M2Task(cfg)
    trained = read_tokenizer(cfg, task.tokenizer, mesh)
    shapes = jax.tree.map(
        lambda leaf, like: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=like.sharding),
        task.tokenizer.params,
        trained,
    )
    kept = manager.read_params(manager.newest(second).absolute(), {KEY: shapes})[KEY]
    # The run keeps a running mean of all parameters, a rounding away from one that stays.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), kept, trained)
    assert KEY not in load(second).params
    check_refused(monkeypatch, first, second, task, mesh)


def check_refused(monkeypatch, first, second, task, mesh):
    """Other sizes, and a run that trained none."""
    for options, message in (
        ({"tokenizer": {"code_dim": 8}}, r"loss.visual_tokenizer.code_dim is 4 there and 8 here"),
        ({"tokenizer": {"target": "features"}}, r"target is pixels there and features here"),
        ({"patch_size": 8}, r"model.patch_size is 4 there and 8 here: make them alike"),
    ):
        with pytest.raises(UserError, match=message):
            read_tokenizer(named(monkeypatch, first, **options), task.tokenizer, mesh)
    with pytest.raises(UserError, match="run: trained no visual tokenizer: name a run with"):
        read_tokenizer(named(monkeypatch, second), task.tokenizer, mesh)


@pytest.mark.slow
def test_a_trained_encoder_teaches_and_stays_as_it_was(tmp_path, monkeypatch, one_batch):
    teacher, folder = tmp_path / "teacher", tmp_path / "tokenizer"
    plain = toy.experiment(monkeypatch, steps=2)
    model = dataclasses.replace(plain.model, patch_size=4)
    main.run(dataclasses.replace(plain, model=model), teacher)
    main.run(experiment(monkeypatch, steps=40, init=str(teacher), target="features"), folder)
    rows = read_rows(folder / "metrics.jsonl")
    assert rows[-1]["tokenizer/cosine"] > rows[0]["tokenizer/cosine"] + 0.05
    jax.tree.map(np.testing.assert_array_equal, load(folder).params, load(teacher).params)
