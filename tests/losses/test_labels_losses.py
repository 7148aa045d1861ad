# SPDX-License-Identifier: Apache-2.0
"""Losses of many labels, of long tails and of two views, against plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2jax.losses import longtail, multilabel, selfsup

# Few shapes: each is compiled anew.
SHAPES = st.sampled_from([(1, 1), (3, 7)])
SIZES = st.tuples(SHAPES, st.integers(0, 999)).map(lambda x: (*x[0], x[1]))


def example(rows, classes, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, classes)).astype(np.float32)
    return x, (rng.random((rows, classes)) < rng.random()).astype(np.int32)


def pairs(x, y, scale, margin):
    """The sum over pairs as it is written."""
    rows = []
    for row, truth in zip(scale * x.astype(np.float64), y, strict=True):
        gaps = margin - row[truth == 1][:, None] + row[truth == 0][None]
        rows.append(np.maximum(gaps, 0).sum())
    return np.mean(rows)


@settings(deadline=None, max_examples=12)
@given(SIZES, st.sampled_from([0.5, 1.0, 2.0]), st.sampled_from([0.0, 0.3, 1.0]))
def test_ranking_is_the_sum_over_pairs(sizes, scale, margin):
    x, y = example(*sizes)
    found = multilabel.ranking_loss(jnp.asarray(x), jnp.asarray(y), scale=scale, margin=margin)
    np.testing.assert_allclose(found, pairs(x, y, scale, margin), rtol=1e-4, atol=1e-5)


def test_ranking_leaves_its_input_alone_and_moves_right_up_and_wrong_down():
    x, y = example(3, 7, 1)
    gradient = jax.grad(multilabel.ranking_loss)(jnp.asarray(x), jnp.asarray(y))
    assert (np.asarray(gradient)[y == 1] <= 0).all()
    assert (np.asarray(gradient)[y == 0] >= 0).all()
    assert np.abs(gradient).max() > 0


def test_ranking_of_ten_thousand_classes_takes_no_square_of_them():
    x, y = example(4, 10_000, 2)
    y[:, 3:] = 0
    found = multilabel.ranking_loss(jnp.asarray(x), jnp.asarray(y))
    np.testing.assert_allclose(found, pairs(x, y, 1.0, 1.0), rtol=1e-4)


@settings(deadline=None, max_examples=8)
@given(SIZES, st.sampled_from([0.0, 1.0, 4.0]), st.sampled_from([0.0, 0.05]), st.booleans())
def test_asymmetric_is_its_formula(sizes, gamma, clip, focus):
    x, y = example(*sizes)
    p = 1 / (1 + np.exp(-x.astype(np.float64)))
    pm = np.maximum(p - clip, 0)
    each = y * (1 - p) * np.log(p) + (1 - y) * pm**gamma * np.log(1 - pm)
    for reduction, expected in (
        ("sum", -each.sum()),
        ("mean", -each.mean()),
        ("batch", -each.sum() / len(x)),
    ):
        found, gradient = jax.value_and_grad(
            lambda z, way=reduction: multilabel.asymmetric_loss(
                z,
                jnp.asarray(y),
                gamma_negative=gamma,
                clip=clip,
                focus_gradient=focus,
                reduction=way,
            )
        )(jnp.asarray(x))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
        assert np.isfinite(gradient).all()


def test_a_label_that_is_not_known_costs_nothing():
    x, y = example(4, 6, 3)
    y[:, 2] = -1
    changed = x.copy()
    changed[:, 2] += 5
    first, second = (
        multilabel.asymmetric_loss(jnp.asarray(z), jnp.asarray(y), reduction="sum")
        for z in (x, changed)
    )
    assert first == second


def test_cut_off_labels_have_no_gradient_that_is_not_a_number():
    x = jnp.array([[-80.0, 80.0, -3.0]])
    for focus in (False, True):
        gradient = jax.grad(
            lambda z, f=focus: multilabel.asymmetric_loss(
                z, jnp.array([[0, 1, 0]]), focus_gradient=f
            )
        )(x)
        assert np.isfinite(gradient).all()


def test_adjusted_and_seesaw_losses_ask_less_of_common_classes():
    counts = jnp.array([900, 90, 10])
    x = jnp.zeros((3, 3))
    targets = jnp.arange(3)
    balanced = longtail.cross_entropy(x, targets, longtail.log_prior(counts))
    assert balanced[0] < balanced[1] < balanced[2]
    np.testing.assert_allclose(balanced, -np.log(np.array(counts) / 1000), rtol=1e-5)
    plain = longtail.cross_entropy(x, targets)
    seesaw = longtail.seesaw(x, targets, counts)
    assert seesaw[0] < plain[0]  # its rarer rivals weigh less
    np.testing.assert_allclose(seesaw[2], plain[2], rtol=1e-4)  # of the rarest all weigh alike


@settings(deadline=None, max_examples=8)
@given(st.sampled_from([2, 6]), st.integers(0, 99))
def test_seesaw_without_its_power_and_one_hot_targets_are_cross_entropy(classes, seed):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(5, classes)), jnp.float32)
    y = jnp.asarray(rng.integers(classes, size=5))
    counts = jnp.asarray(rng.integers(1, 50, size=classes))
    plain = longtail.cross_entropy(x, y)
    np.testing.assert_allclose(longtail.seesaw(x, y, counts, p=0.0), plain, atol=1e-3)
    np.testing.assert_allclose(longtail.cross_entropy(x, jax.nn.one_hot(y, classes)), plain)
    np.testing.assert_allclose(longtail.poly1(x, y, epsilon=0.0), plain, rtol=1e-5)


def test_the_hardest_are_kept_and_one_at_least():
    losses = jnp.array([1.0, 5.0, 3.0, 2.0])
    assert longtail.hardest(losses, 0.5) == 4.0
    assert longtail.hardest(losses, 0.1) == 5.0
    with pytest.raises(ValueError, match="keep=0"):
        longtail.hardest(losses, 0.0)


def test_adjusting_before_and_after_are_opposite():
    counts = jnp.array([50, 5, 1])
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
    after = longtail.posthoc(x + longtail.log_prior(counts, 0.7), counts, 0.7)
    np.testing.assert_allclose(after, x, atol=1e-5)


def test_views_of_one_image_that_agree_cost_less_whatever_their_order():
    rng = np.random.default_rng(0)
    base = rng.normal(size=(4, 16))
    near = np.repeat(base, 2, axis=0) + 0.01 * rng.normal(size=(8, 16))
    pair = np.repeat(np.arange(4), 2)
    order = rng.permutation(8)
    for loss in (selfsup.info_nce, selfsup.hardest_negative):
        good = loss(jnp.asarray(near), jnp.asarray(pair))
        moved = loss(jnp.asarray(near[order]), jnp.asarray(pair[order]))
        bad = loss(jnp.asarray(near), jnp.asarray(np.roll(pair, 1)))
        np.testing.assert_allclose(good, moved, rtol=1e-5)
        assert good < bad


def test_keys_of_the_momentum_encoder_get_no_gradient():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(3, 8)), jnp.float32) for _ in range(2))
    by_query, by_key = jax.grad(selfsup.moco_v3, argnums=(0, 1))(q, k)
    assert np.abs(by_query).max() > 0
    np.testing.assert_array_equal(by_key, 0)
