# SPDX-License-Identifier: Apache-2.0
"""The distillation loss of a visual tokenizer against its formula, and where its gradients go."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from m2jax.losses import quantised


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    told, target = rng.normal(size=(2, 2, 3, 5))
    codes, words = rng.normal(size=(2, 2, 3, 4))
    codes, words = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (codes, words))
    return [jnp.asarray(x) for x in (told, target, codes, words)]


def test_the_loss_is_the_papers_sum_per_patch():
    told, target, codes, words = arrays()
    loss, parts = quantised.distillation_loss(told, target, codes, words, commitment=0.5)
    cosines, gaps = [], []
    for image in range(2):
        for patch in range(3):
            o, t, h, v = (np.asarray(x)[image, patch] for x in (told, target, codes, words))
            cosines.append(o @ t / np.sqrt((o @ o) * (t @ t)))
            gaps.append(((h - v) ** 2).sum())
    np.testing.assert_allclose(parts.cosine, np.mean(cosines), rtol=1e-12)
    np.testing.assert_allclose(parts.gap, np.mean(gaps), rtol=1e-12)
    expected = 1 - np.mean(cosines) + 0.5 * 2 * np.mean(gaps)
    np.testing.assert_allclose(loss, expected, rtol=1e-12)


def test_each_distance_moves_its_own_side_and_the_target_stays():
    found = jax.grad(lambda *x: quantised.distillation_loss(*x)[0], argnums=(0, 1, 2, 3))(*arrays())
    _, _, codes, words = arrays()
    apart = 2 * (codes - words) / 6
    np.testing.assert_array_equal(found[1], 0)
    np.testing.assert_allclose(found[2], apart, rtol=1e-12)
    np.testing.assert_allclose(found[3], -apart, rtol=1e-12)
    assert (np.abs(np.asarray(found[0])) > 0).all()
    told, *rest = arrays()
    check_grads(
        lambda told: quantised.distillation_loss(told, *rest)[0],
        (told,),
        order=1,
        modes=["rev"],
        rtol=1e-6,
    )


def test_the_words_go_on_and_the_codes_get_their_gradient():
    _, _, codes, words = arrays()
    np.testing.assert_allclose(quantised.straight_through(codes, words), words, rtol=1e-15)
    weight = jnp.asarray(np.random.default_rng(3).normal(size=codes.shape))

    def total(codes, words):
        return (weight * quantised.straight_through(codes, words)).sum()

    to_codes, to_words = jax.grad(total, argnums=(0, 1))(codes, words)
    np.testing.assert_array_equal(to_codes, weight)
    np.testing.assert_array_equal(to_words, 0)


def test_words_in_use_are_counted_once():
    found = quantised.words_in_use(jnp.asarray([[3, 3], [0, 3]], jnp.int32), 8)
    assert float(found) == 0.25
