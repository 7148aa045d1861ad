# SPDX-License-Identifier: Apache-2.0
"""Training examples: what is varied stays true, what is simulated is what it says."""

import numpy as np
import pytest

from m2jax.config import UserError
from m2jax.tasks.video import examples
from m2jax.tasks.video.examples import Corpus, Pair


def copied(q0=10, r0=25, count=30, lengths=(60, 70), dim=16):
    """A pair whose frames are all unlike but for one exact copy."""
    rng = np.random.default_rng(0)
    query, reference = (
        (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
        for x in (rng.normal(size=(length, dim)) for length in lengths)
    )
    query[q0 : q0 + count] = reference[r0 : r0 + count]
    return Pair(query, reference, np.array([[q0, r0, q0 + count, r0 + count]], float))


def same(pair, box):
    """Whether the frames of a segment at speed 1 are equal."""
    q0, r0, q1, r1 = np.round(box).astype(int)
    return q1 - q0 == r1 - r0 and np.array_equal(pair.query[q0:q1], pair.reference[r0:r1])


@pytest.mark.parametrize(
    ("query", "reference", "expected"),
    [
        ((0, 60), (0, 70), [[10, 25, 40, 55]]),
        ((20, 60), (0, 70), [[0, 35, 20, 55]]),
        ((0, 25), (0, 70), [[10, 25, 25, 40]]),
        ((0, 60), (30, 45), [[15, 0, 30, 15]]),
        ((0, 25), (38, 70), []),  # two frames are left
        ((45, 60), (0, 70), []),
    ],
)
def test_clipping_cuts_both_sides(query, reference, expected):
    pair = copied()
    found = examples.clip(pair, slice(*query), slice(*reference))
    assert found.boxes.tolist() == expected
    assert all(same(found, box) for box in found.boxes)


def test_a_fast_copy_is_cut_at_its_speed():
    pair = Pair(np.zeros((50, 4)), np.zeros((100, 4)), np.array([[10.0, 20, 30, 60]]))
    found = examples.clip(pair, slice(15, 50), slice(0, 50))
    assert found.boxes.tolist() == [[0, 30, 10, 50]]


def test_varied_pairs_still_show_the_copy():
    pair, kept, swapped = copied(), 0, 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        found = examples.vary(pair, rng, frames=50)
        assert max(len(found.query), len(found.reference)) <= 50
        for box in found.boxes:
            kept += 1
            assert (box[:2] >= 0).all()
            assert (box[2:] <= [len(found.query), len(found.reference)]).all()
            if (box % 1).any():
                continue  # every second frame was taken, from an odd one
            q = np.arange(*np.round(box[[0, 2]]).astype(int))
            r = q - int(box[0]) + int(box[1])
            likeness = (found.query[q] * found.reference[r]).sum(axis=1)
            assert likeness.mean() > 0.6, (seed, likeness)
            swapped += box[0] > box[1]
    assert kept > 100
    assert 0.05 * kept < swapped < 0.95 * kept


def test_simulated_copies_are_alike_and_others_are_not():
    inside, outside, counts = [], [], []
    for seed in range(60):
        pair = examples.simulated(np.random.default_rng(seed), 32, frames=100)
        np.testing.assert_allclose(np.linalg.norm(pair.query, axis=1), 1, atol=1e-5)
        counts.append(len(pair.boxes))
        similarity = pair.query @ pair.reference.T
        for q0, r0, q1, r1 in pair.boxes:
            assert 0 <= q0 < q1 <= len(pair.query)
            assert 0 <= r0 < r1 <= len(pair.reference)
            q = np.arange(int(q0), int(q1))
            r = (r0 + (q - q0) * (r1 - r0) / (q1 - q0)).astype(int)
            inside.append(similarity[q, r].mean())
            outside.append(
                np.delete(similarity, q, axis=0).mean() if len(q) < len(similarity) else 0
            )
    assert {0, 1, 2} <= set(counts)
    assert np.mean(inside) > np.mean(outside) + 0.3


def test_batches_say_which_frames_show_the_same():
    pair = copied()
    found = examples.stack([pair, Pair(pair.query[:20], pair.reference, np.zeros((0, 4)))], 80)
    assert found.lengths.tolist() == [[60, 70], [20, 70]]
    assert (found.query[0, 60:] == 0).all()
    assert found.real.sum(axis=1).tolist() == [1, 0]
    query, reference = found.views[0]
    assert query[10:40].tolist() == list(range(25, 55))
    assert reference[25:55].tolist() == list(range(10, 40))
    assert (np.delete(query, np.s_[10:40]) == -1).all()
    assert (found.views[1] == -1).all()
    twice = Pair(pair.query, pair.reference, np.array([[10.0, 0, 20, 40]]))
    fast = examples.stack([twice], 80).views[0]
    assert fast[0, 10:20].tolist() == [2, 6, 10, 14, 18, 22, 26, 30, 34, 38]
    assert fast[1, :8].tolist() == [10, 10, 10, 10, 11, 11, 11, 11]


def test_of_many_segments_the_longest_stay():
    boxes = np.array([[5 * k, 0, 5 * k + 3 + k % 5, 9] for k in range(12)], float)
    found = examples.stack([Pair(np.zeros((80, 4)), np.zeros((80, 4)), boxes)], 80)
    assert found.real.all()
    kept = found.boxes[0, :, 2] - found.boxes[0, :, 0]
    assert kept.tolist() == sorted((boxes[:, 2] - boxes[:, 0]).tolist())[::-1][:8]


def test_labelled_examples_are_mostly_copies():
    pair = copied()
    other = copied(count=0)
    features = {"q": pair.query, "r": pair.reference, "n": other.query}
    corpus = Corpus(features, [("q", "r"), *[("n", "r")] * 9], [pair.boxes.tolist(), *[[]] * 9])
    assert examples.check(corpus, "x") == 16
    rng = np.random.default_rng(0)
    found = examples.batch(corpus, rng, size=200, frames=80, dim=16, share=0.0)
    assert 0.5 < found.real.any(axis=1).mean() < 0.85  # 0.775, but for those that are cut off
    mixed = examples.batch(corpus, rng, size=8, frames=80, dim=16, share=1.0)
    assert mixed.query.shape == (8, 80, 16)


def test_corpora_that_do_not_fit_are_refused():
    pair = copied()
    features = {"q": pair.query, "r": pair.reference[:, :8]}
    with pytest.raises(UserError, match="features of q and r have 16 and 8 numbers"):
        examples.check(Corpus(features, [("q", "r")], [[]]), "x")
    with pytest.raises(UserError, match="no features of s"):
        examples.check(Corpus(features, [("q", "s")], [[]]), "x")
    with pytest.raises(UserError, match="no pairs to train with"):
        examples.check(Corpus(features, [], []), "x")
