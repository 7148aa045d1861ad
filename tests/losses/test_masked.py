# SPDX-License-Identifier: Apache-2.0
"""Which patches are chosen, what they are compared with, and the loss on them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from m2jax.losses import masked
from m2jax.losses.language import linear_cross_entropy


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 20),
    st.floats(0.0, 1.0),
    st.sampled_from(masked.CHOICES),
    st.integers(0, 99),
)
def test_the_share_is_exact_and_the_choice_is_the_named_one(patches, ratio, which, seed):
    scores = np.random.default_rng(seed).normal(size=(3, patches)).astype(np.float32)
    found = np.asarray(masked.chosen(jnp.asarray(scores), ratio, which, jax.random.key(seed)))
    count = max(1, round(ratio * patches))
    assert found.shape == (3, count)
    for row, taken in zip(scores, found, strict=True):
        assert list(taken) == sorted(set(taken.tolist()))
        order = np.argsort(row)
        if which == "high":
            assert set(taken) == set(order[-count:])
        if which == "low":
            assert set(taken) == set(order[:count])
    mask = np.asarray(masked.as_mask(jnp.asarray(found), patches))
    np.testing.assert_array_equal(mask.sum(1), count)
    assert all(mask[row, found[row]].all() for row in range(3))


def test_random_choices_ignore_the_scores_and_differ_by_key_and_row():
    low, high = jnp.zeros((64, 16)), jnp.arange(64 * 16.0).reshape(64, 16)
    a, b = (masked.chosen(x, 0.5, "random", jax.random.key(0)) for x in (low, high))
    np.testing.assert_array_equal(a, b)
    other = masked.chosen(low, 0.5, "random", jax.random.key(1))
    assert (np.asarray(a) != np.asarray(other)).any()
    counts = np.bincount(np.asarray(a).ravel(), minlength=16)  # 64 rows take half of 16
    assert counts.min() >= 16
    assert counts.max() <= 48


def test_relevance_is_a_cosine_and_passes_no_gradient():
    rng = np.random.default_rng(0)
    patches, text = rng.normal(size=(2, 5, 4)), rng.normal(size=(2, 4))
    found = masked.relevance(jnp.asarray(patches), jnp.asarray(text))
    expected = [[p @ t for p in image] for image, t in zip(patches, text, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    grads = jax.grad(lambda *x: masked.relevance(*x).sum(), argnums=(0, 1))(
        jnp.asarray(patches), jnp.asarray(text)
    )
    jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0), grads)


def test_targets_are_each_patchs_own_standard_scores_in_row_major_order():
    pixels = np.random.default_rng(0).random((2, 8, 12, 3))
    found = np.asarray(masked.patch_targets(jnp.asarray(pixels, jnp.float32), 4))
    assert found.shape == (2, 6, 48)
    for place, (row, column) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]):
        patch = pixels[1, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].reshape(-1)
        expected = (patch - patch.mean()) / np.sqrt(patch.var() + 1e-6)
        np.testing.assert_allclose(found[1, place], expected, rtol=1e-4, atol=1e-5)


def test_a_flat_patch_is_all_zeros():
    assert (np.asarray(masked.patch_targets(jnp.full((1, 4, 4, 3), 0.5), 4)) == 0).all()


def test_the_loss_is_the_mean_over_masked_patches_alone():
    rng = np.random.default_rng(0)
    predicted, target = rng.normal(size=(2, 3, 6, 5))
    mask = rng.random((3, 6)) < 0.5
    mask[0] = False
    expected = ((predicted - target) ** 2).mean(-1)[mask].mean()

    def loss(predicted):
        return masked.masked_pixel_loss(predicted, jnp.asarray(target), jnp.asarray(mask))

    with jax.enable_x64(True):
        value, grad = jax.value_and_grad(loss)(jnp.asarray(predicted))
        check_grads(loss, (jnp.asarray(predicted),), order=1, modes=["rev"], rtol=1e-6)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    np.testing.assert_array_equal(np.asarray(grad)[~mask], 0)
    assert (np.asarray(grad)[mask] != 0).all()


def test_a_cross_entropy_sees_the_chosen_patches_alone():
    rng = np.random.default_rng(0)
    states, table = rng.normal(size=(3, 6, 5)), rng.normal(size=(7, 5))
    codes = rng.integers(0, 7, (3, 6))
    taken = np.array([[0, 4], [1, 2], [3, 5]])
    logits = states @ table.T
    each = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, codes[..., None], -1)[..., 0]
    mask = np.asarray(masked.as_mask(jnp.asarray(taken), 6))

    def loss(states):
        told = masked.at_chosen(states, jnp.asarray(codes), jnp.asarray(taken))
        return linear_cross_entropy(told[0], jnp.asarray(table), *told[1:])

    with jax.enable_x64(True):
        value, grad = jax.value_and_grad(loss)(jnp.asarray(states))
    np.testing.assert_allclose(value, each[mask].mean(), rtol=1e-12)
    np.testing.assert_array_equal(np.asarray(grad)[~mask], 0)
    assert (np.asarray(grad)[mask] != 0).all()


def test_an_unknown_choice_is_refused():
    with pytest.raises(ValueError, match="high, low, random"):
        masked.chosen(jnp.zeros((1, 4)), 0.5, "best", jax.random.key(0))


WORDS = st.lists(st.lists(st.integers(1, 3), max_size=5), min_size=4, max_size=4)


def numbered(lengths, size):
    """[CLS], words of so many tokens each, the end, padding."""
    row = [number for number, length in enumerate(lengths) for _ in range(length)]
    return [-1, *row] + [-1] * (size - 1 - len(row))


@settings(deadline=None, max_examples=60)
@given(WORDS, st.floats(0.0, 1.0, exclude_max=True), st.integers(0, 99))
def test_so_many_words_are_hidden_each_whole_and_nothing_else(texts, ratio, seed):
    word = np.array([numbered(text, 18) for text in texts], np.int32)
    hidden = np.asarray(masked.chosen_words(jnp.asarray(word), ratio, jax.random.key(seed)))
    for row, lengths, taken in zip(word, texts, hidden, strict=True):
        of_word = {number: set(taken[row == number].tolist()) for number in range(len(lengths))}
        assert all(len(found) == 1 for found in of_word.values())  # whole, or not at all
        count = sum(found == {True} for found in of_word.values())
        assert count == (max(1, round(ratio * len(lengths))) if lengths else 0)
        assert not taken[row < 0].any()


def test_hidden_words_differ_by_row_and_key_and_each_has_its_chance():
    word = jnp.asarray([numbered([1, 2, 1, 3], 9)] * 400, jnp.int32)
    first, other = (np.asarray(masked.chosen_words(word, 0.25, jax.random.key(k))) for k in (0, 1))
    assert (first != other).any()
    often = np.array([first[:, np.asarray(word)[0] == n].any(1).mean() for n in range(4)])
    np.testing.assert_allclose(often, 0.25, atol=0.08)  # 3.7 deviations
    np.testing.assert_allclose(often.sum(), 1)
