# SPDX-License-Identifier: Apache-2.0
"""The sigmoid form of the loss as a whole run trains it: two biases beside the model."""

import dataclasses

import jax
import numpy as np
import pytest

from m2jax import config
from m2jax.bundle import load
from m2jax.config import UserError
from m2jax.dist.mesh import make_mesh
from m2jax.train import main
from m2jax.train.image_text import ImageTextTask
from m2jax.train.step import make_step
from tests.train import toy


def sigmoid(monkeypatch, **contrastive):
    base = toy.experiment(monkeypatch, steps=4)
    loss = config.Contrastive(form="sigmoid", scale_init=10.0, bias_init=-3.0, **contrastive)
    return dataclasses.replace(base, loss=config.Loss(contrastive=loss))


def of_pair(image, text, scale, bias):
    """Zhai et al. 2023, equation 1, in plain loops."""
    total = 0.0
    for i, a in enumerate(image):
        for j, b in enumerate(text):
            total += np.log1p(np.exp(-(1 if i == j else -1) * (scale * a @ b + bias)))
    return total / len(image)


@pytest.mark.parametrize("impl", ["dense", pytest.param("ring", marks=pytest.mark.slow)])
def test_the_loss_is_the_papers_on_both_heads(monkeypatch, impl):
    cfg = sigmoid(monkeypatch, impl=impl, backbone_weight=0.25)
    mesh = make_mesh(config.Mesh(), jax.devices()[:2])
    task = ImageTextTask(cfg, mesh)
    params = task.init(jax.random.key(0))
    params |= {"logit_bias": params["logit_bias"] + 1}  # so that a swap of the two shows
    batch = toy.ToySource(cfg).batch(0, slice(None))
    features = task.encode(params, batch, jax.random.key(1))
    found, _ = task.contrast(params, features, batch)

    parts = {k: np.asarray(v, np.float64).reshape(16, 2, -1) for k, v in features.items()}
    expected = 0.0
    for stem, weight, bias in (("backbone_", 0.25, -2.0), ("", 0.75, -3.0)):
        image, text = parts[f"{stem}image"], parts[f"{stem}text"]
        pairs = [of_pair(image[:, i], text[:, j], 10.0, bias) for i in (0, 1) for j in (0, 1)]
        expected += weight * np.mean(pairs)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.slow
def test_a_run_learns_its_biases_and_its_logits_have_the_right_one(tmp_path, monkeypatch):
    cfg = sigmoid(monkeypatch)
    main.run(cfg, tmp_path)
    model = load(tmp_path)
    assert not {"logit_bias", "logit_vl_bias"} & set(model.params)
    mesh = make_mesh(config.Mesh(), jax.devices()[:2])
    step = make_step(cfg, ImageTextTask(cfg, mesh), mesh)
    saved = main.Checkpoints(tmp_path, cfg, {}).restore(step.abstract_state)
    biases = [float(saved.state.params[name]) for name in ("logit_bias", "logit_vl_bias")]
    assert all(abs(bias + 3) > 1e-5 for bias in biases)
    averaged = saved.state.ema
    assert averaged["logit_vl_bias"] != averaged["logit_bias"]
    rows = np.eye(2, 8, dtype=np.float32)
    expected = np.exp(averaged["logit_vl_scale"]) * np.eye(2) + averaged["logit_vl_bias"]
    np.testing.assert_allclose(model.logits(rows, rows), expected, rtol=1e-6)


@pytest.mark.parametrize("other", [{"form": "sigmoid"}, {"mask_same_caption": True}])
def test_smoothing_goes_with_neither_sigmoid_nor_masks(monkeypatch, other):
    base = toy.experiment(monkeypatch)
    loss = config.Contrastive(label_smoothing=0.1, **other)
    with pytest.raises(UserError, match=f"label_smoothing=0.1: .*{next(iter(other))}"):
        ImageTextTask(dataclasses.replace(base, loss=config.Loss(contrastive=loss)))
