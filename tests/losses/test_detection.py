# SPDX-License-Identifier: Apache-2.0
"""Overlaps by hand, assignments by hand, and a loss that falls where boxes come near."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2jax.losses import detection


@pytest.mark.parametrize(
    ("one", "other", "iou", "generalised"),
    [
        ((0, 0, 2, 2), (0, 0, 2, 2), 1, 1),
        ((0, 0, 2, 2), (1, 0, 3, 2), 1 / 3, 1 / 3),
        ((0, 0, 1, 1), (2, 0, 3, 1), 0, -1 / 3),
        ((0, 0, 4, 4), (1, 1, 2, 3), 2 / 16, 2 / 16),
        ((0, 0, 2, 1), (1, 1, 3, 3), 0, -3 / 9),
    ],
)
def test_overlaps(one, other, iou, generalised):
    found = detection.overlaps(jnp.array(one, float), jnp.array(other, float))
    np.testing.assert_allclose(found, [iou, generalised], atol=1e-6)


def grid(size, stride):
    line = (np.arange(size // stride) + 0.5) * stride
    x, y = np.meshgrid(line, line)
    centres = np.stack([x.ravel(), y.ravel()], axis=1)
    return jnp.array(centres), jnp.full(len(centres), float(stride))


def test_places_are_given_the_box_they_fit():
    centres, strides = grid(64, 8)
    truth = jnp.array([[0.0, 0, 24, 24], [32, 32, 64, 64], [0, 0, 64, 64]])
    real = jnp.array([True, True, False])  # the last is padding
    # Each place claims a square of 24 around it; only those near the middles fit.
    boxes = jnp.concatenate([centres - 12, centres + 12], axis=1)
    scores = jnp.linspace(0.4, 0.6, len(centres))  # no ties
    found = detection.assign(scores, boxes, truth, real, centres, strides)
    taken = np.flatnonzero(found.target)
    assert 0 < len(taken) <= 2 * detection.POSITIVES
    for place in taken:
        box = truth[found.box[place]]
        assert (centres[place] > box[:2]).all()
        assert (centres[place] < box[2:]).all()
    assert set(np.array(found.box)[taken]) == {0, 1}
    overlap, _ = detection.overlaps(boxes[:, None], truth[None])
    for number in (0, 1):  # the best place's target is the best overlap
        mine = np.array(found.box) == number
        best = np.array(overlap)[:, number] * mine
        np.testing.assert_allclose(np.array(found.target)[mine].max(), best.max(), atol=1e-5)


def test_a_wanted_place_finds_what_it_overlaps_more():
    centres, strides = jnp.array([[10.0, 10.0]]), jnp.array([8.0])
    truth = jnp.array([[0.0, 0, 20, 20], [6.0, 6, 20, 20]])
    boxes = jnp.array([[5.0, 5, 20, 20]])
    both = jnp.array([True, True])
    found = detection.assign(jnp.array([0.5]), boxes, truth, both, centres, strides)
    assert found.box.tolist() == [1]
    one = detection.assign(
        jnp.array([0.5]), boxes, truth, jnp.array([True, False]), centres, strides
    )
    assert one.box.tolist() == [0]
    np.testing.assert_allclose(one.target, 225 / 400, atol=1e-6)


def test_a_box_thinner_than_a_stride_is_still_found():
    centres, strides = grid(64, 8)
    truth = jnp.array([[29.0, 29, 31, 31]])  # no centre lies in it
    boxes = jnp.concatenate([centres - 4, centres + 4], axis=1)
    scores = jnp.full(len(centres), 0.1)
    found = detection.assign(scores, boxes, truth, jnp.array([True]), centres, strides)
    assert np.count_nonzero(found.target)


def test_loss_by_hand():
    centres, strides = jnp.array([[10.0, 10], [100, 100]]), jnp.array([8.0, 8])
    truth = jnp.array([[[0.0, 0, 20, 20]]])
    boxes = jnp.array([[[0.0, 0, 20, 10], [90, 90, 110, 110]]])
    logits = jnp.array([[0.3, -2.0]])
    terms = detection.loss(logits, boxes, truth, jnp.array([[True]]), centres, strides)
    target = 0.5  # the overlap of the one place that is given the box
    score = np.logaddexp(0, 0.3) - 0.3 * target + np.logaddexp(0, -2.0)
    np.testing.assert_allclose(terms.score, score, rtol=1e-5)  # over max(0.5, 1)
    np.testing.assert_allclose(terms.box, target * 0.5, rtol=1e-5)


def test_nothing_to_find_is_a_loss_of_scores_alone():
    centres, strides = grid(64, 8)
    boxes = jnp.concatenate([centres - 12, centres + 12], axis=1)[None]
    logits = jnp.zeros((1, len(centres)))
    terms = detection.loss(
        logits, boxes, jnp.zeros((1, 2, 4)), jnp.zeros((1, 2), bool), centres, strides
    )
    assert terms.box == 0
    np.testing.assert_allclose(terms.score, len(centres) * np.log(2), rtol=1e-5)


def test_gradients_move_boxes_to_the_truth_and_scores_up_there():
    centres, strides = grid(32, 8)
    truth, real = jnp.array([[[4.0, 6, 26, 20]]]), jnp.array([[True]])

    def total(logits, boxes):
        terms = detection.loss(logits, boxes, truth, real, centres, strides)
        return terms.box + terms.score

    boxes = jnp.concatenate([centres - 9, centres + 9], axis=1)[None]
    logits = jnp.full((1, len(centres)), -2.0)
    step = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))
    first, _ = step(logits, boxes)
    for _ in range(300):
        value, (dl, db) = step(logits, boxes)
        assert np.isfinite(db).all()
        logits, boxes = logits - 0.5 * dl, boxes - 20 * db
    assert value < 0.5 * first
    best = int(logits[0].argmax())
    assert detection.overlaps(boxes[0, best], truth[0, 0])[0] > 0.9
    far = np.array((centres < truth[0, 0, :2]).any(axis=1))
    assert (logits[0][far] < -2).all()
