# SPDX-License-Identifier: Apache-2.0
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2jax.config import Augment
from m2jax.data.augment import augment, on_white

RGBA = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 4), np.uint8)
VIEWS = 2


def run(cfg, rng=0, rgba=RGBA, views=1):
    rows = jnp.asarray(rgba).reshape(-1, views, *rgba.shape[1:])
    out = augment(rows, cfg, jax.random.key(rng), jnp.dtype("float32"))
    return np.asarray(out).reshape(*rgba.shape[:-1], 3)


def test_without_strengths_it_is_the_drawing_on_white():
    np.testing.assert_allclose(
        run(Augment()), on_white(jnp.asarray(RGBA), jnp.dtype("float32")), atol=2e-6
    )


def test_a_sure_flip_mirrors():
    np.testing.assert_allclose(run(Augment(flip=1.0)), run(Augment())[:, :, ::-1], atol=2e-6)


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Augment)])
def test_each_change_changes_something_and_stays_in_range(field):
    strength = {"rotate": 20.0, "hue": 40.0}.get(field, 0.5 if field != "flip" else 1.0)
    cfg = Augment(**{field: strength})
    out = run(cfg, views=VIEWS)
    assert np.abs(out - run(Augment())).max() > 0.01
    assert out.min() >= 0
    assert out.max() <= 1
    np.testing.assert_array_equal(out, run(cfg, views=VIEWS))
    assert (out != run(cfg, rng=1, views=VIEWS)).any() or field == "flip"


def test_a_blend_lies_between_a_drawing_and_another_of_its_own_row():
    rgba = RGBA.copy()
    rgba[..., 3] = 255
    plain = run(Augment(), rgba=rgba)
    out = run(Augment(mix=1.0), rgba=rgba, views=VIEWS)
    partner = plain.reshape(-1, VIEWS, *plain.shape[1:])[:, ::-1].reshape(plain.shape)
    share = ((out - plain) * (partner - plain)).sum((1, 2, 3)) / ((partner - plain) ** 2).sum(
        (1, 2, 3)
    )
    weights = share[:, None, None, None]
    np.testing.assert_allclose(out, plain + weights * (partner - plain), atol=2e-6)
    assert share.min() > 0
    assert share.max() <= 0.5
    assert len(np.unique(share)) == len(share)
    np.testing.assert_allclose(run(Augment(mix=1.0), rgba=rgba), plain, atol=2e-6)  # one view


def test_grey_is_grey_and_hue_keeps_grey():
    out = run(Augment(grey=1.0))
    np.testing.assert_allclose(out[..., 0], out[..., 1], atol=1e-5)
    grey = np.full((2, 8, 8, 4), 100, np.uint8)
    grey[..., 3] = 255
    np.testing.assert_allclose(run(Augment(hue=90.0), rgba=grey), 100 / 255, atol=1e-5)


def test_rotation_keeps_a_centred_disc():
    at = np.arange(16) - 7.5
    disc = np.zeros((4, 16, 16, 4), np.uint8)
    disc[..., 3] = 255 * (np.hypot(at[:, None], at) < 5)
    turned = run(Augment(rotate=30.0), rgba=disc)
    inner = np.hypot(at[:, None], at) < 3.5
    outer = np.hypot(at[:, None], at) > 6.5
    assert turned[:, inner].max() < 0.05
    assert turned[:, outer].min() > 0.95


def test_a_random_background_is_behind_the_drawing_alone():
    rgba = np.zeros((3, 8, 8, 4), np.uint8)
    rgba[:, :4, :, 3] = 255
    out = run(Augment(background=1.0), rgba=rgba)
    np.testing.assert_allclose(out[:, :4], 0, atol=1e-6)
    assert out[:, 4:].std(axis=(1, 2)).max() < 1e-6
    assert len(np.unique(out[:, 4, 0], axis=0)) == 3
