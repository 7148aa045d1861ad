# SPDX-License-Identifier: Apache-2.0
"""TG-MIM of visual tokens: the loss against its formula, what counts, and what stays frozen."""

import dataclasses

import jax
import numpy as np
import pytest

from m2jax import config
from m2jax.checkpoint import manager
from m2jax.config import UserError
from m2jax.dist.mesh import make_mesh
from m2jax.models import params as params_lib
from m2jax.obs.metrics import read_rows
from m2jax.plan import flops
from m2jax.train import main
from m2jax.train.m2_objectives import M2Task
from m2jax.train.sycoca import SyCoCaTask
from m2jax.train.visual_tokenizer import read_tokenizer
from tests.train import test_m2_objectives as m2
from tests.train import test_sycoca as pixels_tests
from tests.train import toy

KEY = "visual_tokenizer"


def experiment(monkeypatch, *, augment=False, masked_image=None, tokenizer=None, **options):
    cfg = pixels_tests.experiment(
        monkeypatch,
        caption={"weight": 0.0},
        masked_image={"target": "tokens", "ratio": 0.25, "positions": 3, **(masked_image or {})},
        **options,
    )
    own = dataclasses.replace(m2.TOKENIZER, **(tokenizer or {}))
    data = toy.experiment(monkeypatch, augment=augment).data
    return dataclasses.replace(
        cfg, data=data, loss=dataclasses.replace(cfg.loss, visual_tokenizer=own)
    )


@pytest.fixture
def wide():
    with jax.enable_x64(True):
        yield


@pytest.mark.slow
def test_the_loss_is_the_mean_over_masked_patches_of_the_whole_views_tokens(wide, monkeypatch):
    """Selection, tokens, logits and the mean in NumPy around encoder and decoder; views changed."""
    cfg = experiment(monkeypatch, augment=True)
    task, params, batch = pixels_tests.setting(cfg)
    rng = jax.random.key(3)

    def by_hand(params, masked, pixels):
        model, heads = task.itc.bind(params), params_lib.bind(task.heads.graph, params["heads"])
        mask = batch["text_mask"].reshape(32, 6)
        text = model.encode_text(batch["text"].reshape(32, 6), mask)
        tokens = model.encode_image(pixels, masked=masked).vl.tokens
        states = heads.masked_image.decoder(tokens, text.vl.tokens, memory_mask=mask)
        tokenizer = params_lib.bind(task.tokenizer.graph, params[KEY])
        return states[:, 1:], tokenizer.quantise(pixels).codes

    forward = jax.jit(task.itc.forward)(params, batch, jax.random.fold_in(rng, 0))
    masked = np.zeros((32, 16), bool)
    for pair in range(32):  # text j goes with view j of two
        masked[pair, pixels_tests.relevant(params, forward, pair, pair, "high")] = True
    states, codes = map(np.asarray, jax.jit(by_hand)(params, masked, forward.pixels))
    book = np.asarray(params[KEY]["codebook"]["embed"])
    book = book / np.linalg.norm(book, axis=1, keepdims=True)
    ids = ((codes[:, :, None] - book) ** 2).sum(-1).argmin(-1)
    each = m2.lost(states, np.asarray(params["heads"]["masked_image"]["tokens"]["embed"]), ids)
    loss = jax.jit(jax.value_and_grad(task.loss, has_aux=True))
    (total, metrics), grads = loss(params, batch, rng)
    np.testing.assert_allclose(metrics["loss/masked_image"], each[masked].mean(), rtol=1e-7)
    contrast = 0.5 * (metrics["loss/vl"] + metrics["loss/backbone"]) * 0.5
    np.testing.assert_allclose(total, contrast + 1.5 * metrics["loss/masked_image"], rtol=1e-7)
    jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0), grads[KEY])
    m2.check_frozen(task, grads)
    assert set(task.layer_scales(0.5)) == set(params_lib.flatten(task.model.params))


def test_both_tellers_of_tokens_share_one_tokenizer(monkeypatch):
    both = {"masked_image": config.MaskedImage(weight=1.0, target="tokens", tokenizer="a")}
    cfg = m2.experiment(monkeypatch, loss=both, masked_tokens={"tokenizer": "b"})
    task = M2Task(cfg)
    assert task.tokenizer is task.base.tokenizer
    params = jax.eval_shape(task.init, jax.random.key(0))
    assert jax.tree.structure(params) == jax.tree.structure(task.model.params)
    mesh = make_mesh(config.Mesh(), jax.devices()[:1])
    with pytest.raises(UserError, match=r"image.tokenizer=a: loss.masked_tokens.tokenizer is b: "):
        read_tokenizer(cfg, task.tokenizer, mesh)


def test_a_run_without_a_trained_tokenizer_is_refused(monkeypatch, tmp_path):
    mesh = make_mesh(config.Mesh(), jax.devices()[:1])
    for name, message in (
        ("", r"masked_image.tokenizer='': TG-MIM of tokens needs a trained visual tokenizer: "),
        (str(tmp_path / "no"), r"masked_image.tokenizer=.*no: no such directory: name a work dir"),
    ):
        cfg = experiment(monkeypatch, masked_image={"tokenizer": name})
        with pytest.raises(UserError, match=message):
            read_tokenizer(cfg, SyCoCaTask(cfg).tokenizer, mesh)


def test_painting_pixels_needs_no_tokenizer(monkeypatch):
    task = SyCoCaTask(experiment(monkeypatch, masked_image={"target": "pixels"}))
    assert task.tokenizer is None
    assert KEY not in task.model.params
    assert "out" in task.model.params["heads"]["masked_image"]


def test_the_trace_against_the_sizes():
    """What ``m2jax plan`` counts for it, within what heads and the contrast add."""
    sizes = config.resolve(config.Model(width=96, dtype="float32", remat="full"))
    loss = config.Loss(masked_image=config.MaskedImage(weight=1.0, target="tokens", positions=2))
    cfg = config.Experiment(model=sizes, data=config.Data(batch_size=16, views=2), loss=loss)
    needed = main.model_flops(cfg, make_mesh(cfg.mesh))
    assert 1.0 <= needed / flops.from_sizes(cfg, SyCoCaTask(cfg).model) < 1.06


@pytest.mark.slow
def test_a_run_learns_tokens_and_leaves_the_tokenizer_as_it_was(tmp_path, monkeypatch):
    real = toy.ToySource.batch
    monkeypatch.setattr(toy.ToySource, "batch", lambda self, _, rows: real(self, 0, rows))
    first, second = tmp_path / "tokenizer", tmp_path / "run"
    cfg = experiment(monkeypatch, steps=12, masked_image={"tokenizer": str(first)})
    trains = dataclasses.replace(cfg.loss.visual_tokenizer, weight=1.0)
    alone = dataclasses.replace(
        cfg,
        loss=config.Loss(visual_tokenizer=trains),
        train=dataclasses.replace(cfg.train, steps=2),
    )
    main.run(alone, first)
    main.run(cfg, second)
    rows = read_rows(second / "metrics.jsonl")
    assert rows[-1]["loss/masked_image"] < rows[0]["loss/masked_image"] - 0.01
    mesh = make_mesh(config.Mesh(), jax.devices()[:1])
    tokenizer = SyCoCaTask(cfg).tokenizer
    trained = read_tokenizer(cfg, tokenizer, mesh)
    shapes = jax.tree.map(
        lambda leaf, like: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=like.sharding),
        tokenizer.params,
        trained,
    )
    kept = manager.read_params(manager.newest(second).absolute(), {KEY: shapes})[KEY]
    # The run keeps a running mean of all parameters, a rounding away from one that stays.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), kept, trained)
    other = experiment(monkeypatch, patch_size=8, masked_image={"tokenizer": str(first)})
    with pytest.raises(UserError, match=r"image.tokenizer=.*patch_size is 4 there and 8 here"):
        read_tokenizer(other, tokenizer, mesh)
