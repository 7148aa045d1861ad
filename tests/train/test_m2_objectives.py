# SPDX-License-Identifier: Apache-2.0
"""M2's masked objectives: each against its formula, no leaks, and what learns."""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2jax import config
from m2jax.config import UserError
from m2jax.dist.mesh import make_mesh
from m2jax.losses import masked as masked_lib
from m2jax.models import params as params_lib
from m2jax.train import m2_objectives, main
from m2jax.train.image_text import ImageTextTask
from m2jax.train.m2_objectives import M2Task
from m2jax.train.step import make_step
from tests.models.dual_toys import TOYS
from tests.train import toy

TOKENIZER = config.VisualTokenizer(
    codes=32, code_dim=4, width=8, heads=2, encoder_layers=1, target="pixels"
)


def experiment(monkeypatch, *, masked_text=None, masked_tokens=None, loss=None, steps=4, **model):
    base = toy.experiment(monkeypatch, steps=steps)
    made = config.Loss(
        **{
            "contrastive": config.Contrastive(weight=0.5),
            "masked_text": config.MaskedText(
                **{"weight": 1.5, "positions": 2, **(masked_text or {})}
            ),
            "masked_tokens": config.MaskedTokens(
                **{"weight": 0.7, "positions": 3, "ratio": 0.25, **(masked_tokens or {})}
            ),
            "visual_tokenizer": TOKENIZER,
            **(loss or {}),
        }
    )
    dtype = "float64" if jax.config.jax_enable_x64 else "float32"
    model = {"dtype": dtype, "param_dtype": dtype, "patch_size": 4, **model}
    return dataclasses.replace(base, loss=made, model=dataclasses.replace(base.model, **model))


def batch_of(cfg):
    """Rows with and without padding, and words of one and two tokens."""
    batch = dict(toy.ToySource(cfg).batch(0, slice(None)))
    batch["text_mask"][1:, :, 4:] = False
    batch["text_word"] = np.broadcast_to(
        np.array([-1, 0, 1, -1, -1, -1], np.int32), batch["text"].shape
    ).copy()
    batch["text_word"][0] = [-1, 0, 0, 1, 2, -1]
    return jax.tree.map(jnp.asarray, batch)


def setting(cfg):
    task = M2Task(cfg)
    return task, jax.jit(task.init)(jax.random.key(0)), batch_of(cfg)


@pytest.fixture
def wide():
    with jax.enable_x64(True):
        yield


def asked(task, monkeypatch):
    """What each objective asks of the cross-entropy: states, table, targets, weights; jitted."""
    seen = []
    monkeypatch.setattr(
        m2_objectives, "linear_cross_entropy", lambda *x, **_: (seen.append(x), jnp.zeros(()))[1]
    )

    def traced(params, batch):
        seen.clear()
        task.loss(params, batch, jax.random.key(3))
        return list(seen)

    return jax.jit(traced)


def normed(x, scale, bias):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * scale + bias


def lost(states, table, targets):
    logits = states @ table.T
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(log_p, targets[..., None], -1)[..., 0]


class Whole(NamedTuple):
    """One step of all objectives: compiled once for the tests that read it."""

    cfg: config.Experiment
    task: M2Task
    params: params_lib.Params
    batch: dict
    loss: Callable
    total: jax.Array
    metrics: dict
    grads: params_lib.Params


@pytest.fixture(scope="module")
def whole():
    with pytest.MonkeyPatch.context() as patch, jax.enable_x64(True):
        cfg = experiment(patch)
        task, params, batch = setting(cfg)
        loss = jax.jit(jax.value_and_grad(task.loss, has_aux=True))
        (total, metrics), grads = loss(params, batch, jax.random.key(3))
        yield Whole(cfg, task, params, batch, loss, total, metrics, grads)


@pytest.mark.slow
def test_the_loss_is_the_weighted_sum_and_its_encoder_starts_as_without_heads(wide, whole):
    contrast, _ = jax.jit(ImageTextTask(whole.cfg).loss)(
        whole.params, whole.batch, jax.random.key(3)
    )
    parts = [whole.metrics[f"loss/{name}"] for name in ("masked_text", "masked_tokens")]
    np.testing.assert_allclose(whole.total, contrast + 1.5 * parts[0] + 0.7 * parts[1], rtol=1e-12)
    alone = jax.jit(ImageTextTask(whole.cfg).init)(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, alone, {k: whole.params[k] for k in alone})


@pytest.mark.slow
def test_cmlm_is_the_mean_over_hidden_tokens(wide, whole):
    """Embeddings, head and sum in NumPy around the joint mode, which has its own goldens."""
    cfg, task, params, batch, _, _, metrics, _ = whole
    keys = jax.random.split(jax.random.fold_in(jax.random.key(3), 3), 3)
    word = batch["text_word"].reshape(32, 6)
    hidden = np.asarray(masked_lib.chosen_words(word, 0.5, jax.random.split(keys[1])[0]))
    assert (hidden.sum(1) >= 1).all()
    p = jax.tree.map(np.asarray, params)
    head, ids = p["m2_heads"]["masked_text"], np.asarray(batch["text"]).reshape(32, 6)
    text = np.where(hidden[..., None], head["mask_token"], p["text_embed"][ids])
    text = text + p["text_positions"][2:8]

    def joint(params, batch, text):
        model = task.itc.bind(params)
        pairs = task._pairs(batch, keys[0], model.dtype)
        return model.encode_joint(model.embed_image(pairs.pixels), text, pairs.mask)

    states = np.asarray(jax.jit(joint)(params, batch, jnp.asarray(text)).text)
    hard = states @ head["linear"]["kernel"] + head["linear"]["bias"]
    hard = hard * 0.5 * (1 + np.vectorize(math.erf)(hard / math.sqrt(2)))
    hard = normed(hard, head["norm"]["scale"], head["norm"]["bias"])
    each = lost(hard, p["text_embed"][: cfg.model.vocab_size], ids)
    np.testing.assert_allclose(metrics["loss/masked_text"], each[hidden].mean(), rtol=1e-10)


@pytest.mark.slow
def test_cmim_is_the_mean_over_hidden_patches_of_the_text_it_belongs_to(wide, whole):
    """Text (row, language) goes with view ``language`` of two; tokens are of the whole view."""
    _, task, params, batch, _, _, metrics, _ = whole
    keys = jax.random.split(jax.random.fold_in(jax.random.key(3), 3), 3)
    scores = jnp.zeros((32, 16), jnp.float32)
    hidden = np.asarray(masked_lib.chosen(scores, 0.25, "random", jax.random.split(keys[2])[0]))
    rgba = np.asarray(batch["image"]).reshape(32, 16, 16, 4) / 255
    pixels = rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:]  # on white

    def encoded(params, pixels, masked):
        model = task.itc.bind(params)
        tokenizer = params_lib.bind(task.tokenizer.graph, params["visual_tokenizer"])
        text = model.embed_text(batch["text"].reshape(32, 6))
        mask = batch["text_mask"].reshape(32, 6)
        image = model.embed_image(pixels, masked=masked)
        return model.encode_joint(image, text, mask).image, tokenizer.quantise(pixels).ids

    masked = masked_lib.as_mask(jnp.asarray(hidden), 16)
    states, codes = map(np.asarray, jax.jit(encoded)(params, jnp.asarray(pixels), masked))
    table = np.asarray(params["m2_heads"]["masked_tokens"]["embed"])
    each = lost(states[:, 1:], table, codes)
    np.testing.assert_allclose(
        metrics["loss/masked_tokens"], np.take_along_axis(each, hidden, 1).mean(), rtol=1e-7
    )


@pytest.mark.slow
def test_a_hidden_word_gives_nothing_away(wide, monkeypatch):
    task, params, batch = setting(experiment(monkeypatch, masked_tokens={"weight": 0.0}))
    ask = asked(task, monkeypatch)
    ((states, _, ids, hidden),) = ask(params, batch)
    hidden = np.asarray(hidden)
    assert not hidden[np.asarray(batch["text_word"]).reshape(32, 6) < 0].any()
    text, real = np.asarray(ids), np.asarray(batch["text_mask"]).reshape(32, 6)

    def states_of(ids):
        ((found, *_),) = ask(params, {**batch, "text": jnp.asarray(ids).reshape(16, 2, 6)})
        return np.asarray(found)

    np.testing.assert_array_equal(states_of(np.where(hidden, text ^ 1, text)), states)
    behind = states_of(np.where(real, text, text ^ 1))  # padding is not seen by what is a token
    np.testing.assert_array_equal(behind[real], np.asarray(states)[real])
    shown = real & ~hidden
    shown[:, [0, 3, 5]] = False
    changed = np.abs(states_of(np.where(shown, text ^ 1, text)) - states).max(-1)
    assert (changed[shown.any(1)][:, 1] > 1e-9).all()


@pytest.mark.slow
def test_a_hidden_patch_gives_nothing_away_and_the_text_is_read(wide, monkeypatch):
    task, params, batch = setting(experiment(monkeypatch, masked_text={"weight": 0.0}))
    ask = asked(task, monkeypatch)
    ((states, _, codes, weight),) = ask(params, batch)
    assert states.shape[:2] == codes.shape == weight.shape == (32, 4)  # a quarter of 16
    keys = jax.random.split(jax.random.fold_in(jax.random.key(3), 3), 3)
    scores = jnp.zeros((32, 16), jnp.float32)
    hidden = np.asarray(masked_lib.as_mask(
        masked_lib.chosen(scores, 0.25, "random", jax.random.split(keys[2])[0]), 16
    ))  # fmt: skip
    image = np.asarray(batch["image"]).reshape(32, 16, 16, 4)
    where = hidden.reshape(32, 4, 4).repeat(4, 1).repeat(4, 2)[..., None]

    def states_of(image, **other):
        changed = {**batch, "image": jnp.asarray(image).reshape(16, 2, 16, 16, 4), **other}
        ((found, *_),) = ask(params, changed)
        return np.asarray(found)

    np.testing.assert_array_equal(states_of(np.where(where, 90, image).astype(np.uint8)), states)
    shown = states_of(np.where(where, image, 90).astype(np.uint8))
    assert (np.abs(shown - states).max((1, 2)) > 1e-6).all()
    told = states_of(image, text=batch["text"].at[:, :, 2].add(1))
    assert (np.abs(told - states).max((1, 2)) > 1e-9).all()
    padded = states_of(image, text=batch["text"].at[1:, :, 5].add(1))
    np.testing.assert_array_equal(padded, states)


@pytest.mark.slow
def test_gradients_are_those_of_differences(wide, whole):
    jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0), whole.grads["visual_tokenizer"])
    rng = np.random.default_rng(0)
    direction = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), whole.params)
    direction["visual_tokenizer"] = jax.tree.map(jnp.zeros_like, direction["visual_tokenizer"])
    step = 1e-6
    moved = []
    for sign in (1, -1):
        there = jax.tree.map(lambda p, d, s=sign: p + s * step * d, whole.params, direction)
        moved.append(whole.loss(there, whole.batch, jax.random.key(3))[0][0])
    along = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).sum(), whole.grads, direction)))
    np.testing.assert_allclose((moved[0] - moved[1]) / (2 * step), along, rtol=2e-5)


def check_frozen(task, grads):
    """A parameter is frozen exactly where its gradient is zero."""
    for name, grad in params_lib.flatten(grads).items():
        # A key's bias adds the same to all scores of a query: no gradient but rounding.
        if ".k.bias" not in name:
            assert task.frozen(name) == (not np.abs(np.asarray(grad)).max() > 0), name


@pytest.mark.slow
def test_what_is_read_learns_and_nothing_else(whole):
    check_frozen(whole.task, whole.grads)


@pytest.mark.slow
@pytest.mark.parametrize("vl", ["A", "B"])
def test_what_is_read_learns_with_other_weights_of_the_vl_layers(wide, monkeypatch, vl):
    task, params, batch = setting(experiment(monkeypatch, loss={"joint_vl": vl}))
    loss = jax.jit(jax.grad(lambda p: task.loss(p, batch, jax.random.key(3))[0]))
    check_frozen(task, loss(params))


def test_dropped_weights_drop_their_heads(monkeypatch):
    task = M2Task(experiment(monkeypatch, masked_tokens={"weight": 0.0}))
    assert "visual_tokenizer" not in task.model.params
    assert set(task.model.params["m2_heads"]) == {"masked_text"}
    assert "text_word" in task.batch_spec(4)
    task = M2Task(experiment(monkeypatch, masked_text={"weight": 0.0}))
    assert "text_word" not in task.batch_spec(4)
    scales = task.layer_scales(0.5)
    assert set(scales) == set(params_lib.flatten(task.model.params))


def test_all_five_objectives_go_together(monkeypatch):
    cfg = experiment(
        monkeypatch,
        loss={
            "caption": config.Caption(weight=1.0),
            "masked_image": config.MaskedImage(weight=1.0),
        },
    )
    task = main.make_task(cfg, make_mesh(config.Mesh(), jax.devices()[:1]))
    assert isinstance(task, M2Task)
    _, metrics = jax.eval_shape(
        task.loss, task.model.params, batch_of(cfg), jax.eval_shape(jax.random.key, 0)
    )
    names = ("vl", "caption", "masked_image", "masked_text", "masked_tokens")
    assert set(metrics) >= {f"loss/{name}" for name in names}


@pytest.mark.slow
def test_eight_devices_equal_one(monkeypatch):
    cfg = experiment(monkeypatch)
    found = []
    for spec, devices in ((config.Mesh(), 1), (config.Mesh(data=2, fsdp=2, model=2), 8)):
        mesh = make_mesh(spec, jax.devices()[:devices])
        step = make_step(cfg, M2Task(cfg, mesh), mesh)
        _, metrics = step.run(step.init(), batch_of(cfg))
        found.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)


def test_what_does_not_go_together_is_said(monkeypatch):
    with pytest.raises(UserError, match=r"patch_drop=0.5: .*masked_tokens.weight to 0"):
        M2Task(experiment(monkeypatch, patch_drop=0.5))
    mesh = make_mesh(config.Mesh(), jax.devices()[:1])
    cfg = experiment(monkeypatch)
    with pytest.raises(
        UserError, match=r"loss\.masked_text\.weight, loss\.masked_tokens\.weight: a"
    ):
        main.make_task(cfg, mesh, TOYS["clip"])
    trained = dataclasses.replace(TOKENIZER, weight=1.0)
    both = dataclasses.replace(cfg, loss=dataclasses.replace(cfg.loss, visual_tokenizer=trained))
    with pytest.raises(UserError, match=r"loss\.masked_text\.weight: a run trains the tokenizer"):
        main.make_task(both, mesh)
