# SPDX-License-Identifier: Apache-2.0
"""Keyframes: their classes by hand, the gradient of a choice, and times there and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2jax.tasks.video import keyframes


def unit(rng, *shape):
    x = rng.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def test_the_class_is_the_frame_most_like_the_other_view():
    rng = np.random.default_rng(0)
    frames, views = unit(rng, 3, 5, 4, 8), unit(rng, 3, 5, 4, 8)
    real = rng.random((3, 5, 4)) < 0.7
    real[..., 1] = True
    found = np.array(keyframes.classes(frames, views, jnp.array(real)))
    for b, k in np.ndindex(3, 5):
        there = np.flatnonzero(real[b, k])
        mean = {i: np.mean([frames[b, k, i] @ views[b, k, j] for j in there]) for i in there}
        assert found[b, k] == max(mean, key=mean.get)


def test_loss_is_of_windows_with_a_choice():
    logits = jnp.array([[1.0, 2.0, 9.0], [5.0, 0.0, 0.0], [3.0, 1.0, 1.0]])
    real = jnp.array([[True, True, False], [True, False, False], [True, True, True]])
    found = keyframes.loss(logits, jnp.array([0, 0, 0]), real)
    first = np.log(np.e + np.e**2) - 1
    third = np.log(np.e**3 + 2 * np.e) - 3
    np.testing.assert_allclose(found, (first + third) / 2, rtol=1e-5)
    assert keyframes.loss(logits, jnp.array([0, 0, 0]), jnp.zeros((3, 3), bool)) == 0


def test_a_choice_is_whole_and_its_gradient_a_softmaxs():
    logits = jnp.array([[[0.3, 1.2, -0.5, 4.0]]])
    real = jnp.array([[[True, True, True, False]]])
    values = jnp.array([2.0, -1.0, 0.7, 5.0])
    assert keyframes.pick(logits, real).tolist() == [[[0, 1, 0, 0]]]
    found = jax.grad(lambda x: (keyframes.pick(x, real) * values).sum())(logits)
    soft = jax.grad(lambda x: (jax.nn.softmax(x[..., :3]) * values[:3]).sum())(logits)
    np.testing.assert_allclose(found[..., :3], soft[..., :3], rtol=1e-5)
    assert found[0, 0, 3] == 0


def test_noise_chooses_in_the_softmaxs_shares():
    logits = jnp.broadcast_to(jnp.array([0.0, 1.0, -1.0]), (1, 20000, 3))
    real = jnp.ones(logits.shape, bool)
    share = keyframes.pick(logits, real, jax.random.key(0)).mean(axis=(0, 1))
    np.testing.assert_allclose(share, jax.nn.softmax(logits[0, 0]), atol=0.01)


def test_which_frames_are_kept():
    assert keyframes.uniform(10, 4).tolist() == [1, 5, 8]
    assert keyframes.uniform(3, 1).tolist() == [0, 1, 2]
    assert keyframes.uniform(1, 4).tolist() == [0]
    logits = np.array([0.0, 3, 1, 1, 5, 0, 0, 7, -2, -1])
    assert keyframes.highest(logits, 4).tolist() == [1, 7, 9]
    assert keyframes.highest(logits[:8], 4).tolist() == [1, 7]


def test_like_keyframes_are_dropped():
    angles = np.radians([0, 10, 25, 80, 85, 170])
    features = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    kept = np.array([0, 1, 2, 4, 5])
    # 10 is near 0; 25 is too, though less near to 10 it is not: the one kept before counts.
    assert keyframes.unlike(features, kept, np.cos(np.radians(20))).tolist() == [0, 2, 4, 5]
    assert keyframes.unlike(features, kept, 0.9999).tolist() == kept.tolist()


def test_times_of_keyframes_and_back():
    edges = keyframes.edges(np.array([1, 6, 7]), 12)
    # Frames 1 and 6 are at 1.5 and 6.5: halfway is 4; 6 and 7 part at 7.
    assert edges.tolist() == [0, 4, 7, 12]
    boxes = np.array([[0, 1, 1, 3], [0.5, 0, 2.5, 1.5]])
    other = np.array([0.0, 10, 20, 26])
    found = keyframes.in_time(boxes, edges, other)
    assert found.tolist() == [[0, 10, 4, 26], [2, 0, 9.5, 15]]
    every = keyframes.edges(np.arange(5), 5)
    assert every.tolist() == [0, 1, 2, 3, 4, 5]
    assert keyframes.in_time(np.zeros((0, 4)), edges, other).shape == (0, 4)


@pytest.mark.parametrize("window", [2, 4, 7])
def test_times_of_keyframes_have_no_bias(window):
    """A copy's ends are found early as often as late."""
    rng = np.random.default_rng(window)
    miss = []
    for _ in range(3000):
        kept = keyframes.highest(rng.normal(size=84), window)
        edges = keyframes.edges(kept, 84)
        start = int(rng.integers(10, 40))
        end = start + int(rng.integers(2 * window, 34))
        inside = np.flatnonzero((kept >= start) & (kept < end))
        miss.append([edges[inside[0]] - start, edges[inside[-1] + 1] - end])
    assert np.abs(np.mean(miss, axis=0)).max() < 0.1


def test_the_scorer_looks_at_neighbours_alone():
    from flax import nnx

    scorer = keyframes.Scorer(6, 8, 4, rngs=nnx.Rngs(0))
    scorer.second.kernel[...] = jax.random.normal(jax.random.key(1), (3, 8, 1))
    features = unit(np.random.default_rng(0), 1, 30, 6)
    before = scorer(jnp.array(features))
    features[0, 15] = -features[0, 15]
    changed = np.flatnonzero(np.abs(scorer(jnp.array(features)) - before)[0] > 1e-6)
    assert changed.tolist() == [12, 13, 14, 15, 16, 17, 18]


@pytest.mark.parametrize("window", [2, 3, 4, 7])
def test_before_training_the_middle_of_each_window_is_kept(window):
    from flax import nnx

    scorer = keyframes.Scorer(6, 8, window, rngs=nnx.Rngs(0))
    features = unit(np.random.default_rng(0), 1, 5 * window, 6)
    found = np.array(scorer(jnp.array(features)))[0]
    kept = keyframes.highest(found, window)
    np.testing.assert_array_equal(kept, keyframes.uniform(5 * window, window))
    share = np.exp(found[:window] - found[:window].max())
    assert (share / share.sum()).max() > 0.9
