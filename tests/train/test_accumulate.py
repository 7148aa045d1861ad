# SPDX-License-Identifier: Apache-2.0
"""``train.accumulate`` and ``loss.contrastive.*`` from config to the step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2jax import config
from m2jax.config import UserError
from m2jax.data.loader import make_loader
from m2jax.dist.mesh import make_mesh
from m2jax.train.image_text import ImageTextTask, same_caption
from m2jax.train.step import make_step
from tests.train import toy


def steps(cfg, devices=2):
    """Loss and gradient norm of two steps, and a parameter after them."""
    mesh = make_mesh(cfg.mesh, jax.devices()[:devices])
    step = make_step(cfg, ImageTextTask(cfg, mesh), mesh)
    state, loader = step.init(), make_loader(cfg, mesh)
    rows = []
    for _ in range(2):
        state, metrics = step.run(state, next(loader))
        rows.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    loader.close()
    return np.array(rows), np.asarray(state.params["image_vl_head"]["kernel"])


def plain(monkeypatch, contrastive=None, **train):
    """The toy experiment with this reduction."""
    cfg = toy.experiment(monkeypatch, **train)
    loss = config.Loss(contrastive=config.Contrastive(**(contrastive or {})))
    return dataclasses.replace(cfg, loss=loss)


@pytest.mark.slow
def test_four_micro_batches_are_one_batch(monkeypatch):
    whole, kernel = steps(plain(monkeypatch))
    parts, same_kernel = steps(plain(monkeypatch, accumulate=4))
    np.testing.assert_allclose(parts, whole, rtol=1e-5)
    np.testing.assert_allclose(same_kernel, kernel, rtol=1e-4, atol=1e-6)
    detached, _ = steps(plain(monkeypatch, accumulate=4, accumulation="detach"))
    np.testing.assert_allclose(detached[0, 0], whole[0, 0], rtol=1e-5)  # the loss is the same
    assert detached[0, 1] < 0.9 * whole[0, 1]  # the gradient is not


@pytest.mark.slow
def test_other_reductions_train_alike(monkeypatch):
    whole, _ = steps(plain(monkeypatch))
    ring, _ = steps(plain(monkeypatch, {"impl": "ring", "tile": 4}))
    np.testing.assert_allclose(ring, whole, rtol=1e-5)
    alone, _ = steps(plain(monkeypatch, {"impl": "grouped", "group": 1}))
    assert alone[0, 0] < 0.9 * whole[0, 0]  # half the negatives


@pytest.mark.parametrize(
    ("accumulate", "match"),
    [(3, r"data\.batch_size=16 does not divide into 3 parts on each of 2"), (0, "accumulate=0")],
)
def test_a_batch_that_does_not_divide_is_refused(monkeypatch, accumulate, match):
    cfg = plain(monkeypatch, accumulate=accumulate)
    mesh = make_mesh(cfg.mesh, jax.devices()[:2])
    with pytest.raises(UserError, match=match):
        make_step(cfg, ImageTextTask(cfg, mesh), mesh)


def test_a_task_in_one_piece_is_refused(monkeypatch):
    class Whole:
        """Only what ``Task`` asks for."""

        def __init__(self, inner):
            for name in (
                "model",
                "init",
                "loss",
                "batch_spec",
                "after_update",
                "frozen",
                "layer_scales",
            ):
                setattr(self, name, getattr(inner, name))

    cfg = plain(monkeypatch, accumulate=2)
    mesh = make_mesh(cfg.mesh, jax.devices()[:2])
    with pytest.raises(UserError, match="Whole has no encode and contrast"):
        make_step(cfg, Whole(ImageTextTask(cfg, mesh)), mesh)


def test_captions_are_numbered_by_what_they_say():
    text = np.random.default_rng(0).integers(0, 9, (500, 2, 4), np.int32)
    numbers = np.asarray(same_caption(jnp.asarray(text)))
    assert numbers.shape == (2, 500)
    for language in range(2):
        captions = {tuple(row) for row in text[:, language]}
        assert len({*zip(map(tuple, text[:, language]), numbers[language], strict=True)}) == len(
            captions
        )
        assert len(set(numbers[language])) == len(captions)


def test_the_same_caption_twice_is_no_negative(monkeypatch):
    cfg = plain(monkeypatch, {"mask_same_caption": True})
    task = ImageTextTask(cfg)
    params = task.init(jax.random.key(0))
    rng = np.random.default_rng(1)
    features = {
        name: jnp.asarray(rng.normal(size=(4 * 2, 8)), jnp.float32)
        for name in ("image", "text", "backbone_image", "backbone_text")
    }
    text = rng.integers(0, 50, (4, 2, 6), np.int32)
    batch = {"image": np.zeros((4, 2, 1)), "text": jnp.asarray(np.repeat(text[:1], 4, axis=0))}
    assert task.contrast(params, features, batch)[0] == 0  # one caption: no negatives at all
    assert task.contrast(params, features, batch | {"text": jnp.asarray(text)})[0] > 0
