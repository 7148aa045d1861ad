# SPDX-License-Identifier: Apache-2.0
"""The arrays' metric equals the definition written out in loops, and holds what it promises."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2jax.config import UserError
from m2jax.tasks.video import metric

COORDINATES = st.one_of(st.integers(0, 30), st.floats(0, 30, width=32))
BOXES = st.tuples(COORDINATES, COORDINATES, COORDINATES, COORDINATES)
PAIR = st.tuples(st.lists(BOXES, max_size=12), st.lists(BOXES, max_size=5))


def upright(boxes):
    """The same with each axis in order."""
    return [[min(a, c), min(b, d), max(a, c), max(b, d)] for a, b, c, d in boxes]


def union(segments):
    """Length of a union, one segment after the other, in float32."""
    merged = []
    for start, end in sorted(segments):
        if merged and not merged[-1][1] < start:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    table = np.array(merged, np.float32)
    return np.sum(table[:, 1] - table[:, 0])


def side(ones, others):
    """Precision where ``ones`` are predictions, recall where they are labels."""
    product = 1.0
    for axis in range(2):
        matched = 0.0
        for one in ones:
            shared = [
                (max(one[axis], other[axis]), min(one[axis + 2], other[axis + 2]))
                for other in others
                if all(max(one[a], other[a]) < min(one[a + 2], other[a + 2]) for a in range(2))
            ]
            matched += float(union(shared)) if shared else 0.0
        product *= matched / (sum(box[axis + 2] - box[axis] for box in ones) + 1e-6)
    return product


def by_definition(predicted, true):
    if not predicted or not true:
        return float(not predicted), float(not true)
    return side(predicted, true), side(true, predicted)


@settings(deadline=None)
@given(st.lists(PAIR, max_size=6))
def test_equal_to_the_definition(pairs):
    predictions, truth = ([upright(pair[i]) for pair in pairs] for i in range(2))
    found = metric.score(predictions, truth)
    for number, (one, other) in enumerate(zip(predictions, truth, strict=True)):
        expected = by_definition(one, other)
        got = found.precision[number], found.recall[number]
        whole = all(float(x).is_integer() for box in one + other for x in box)
        # Sums of fractions in float32 depend on their order in the last place.
        assert got == pytest.approx(expected, rel=1e-12 if whole else 5e-7, abs=1e-12)


@settings(deadline=None, max_examples=30)
@given(st.lists(PAIR, min_size=1, max_size=6), st.integers(1, 20))
def test_chunks_do_not_show(pairs, size):
    predictions, truth = ([upright(pair[i]) for pair in pairs] for i in range(2))
    whole = metric.score(predictions, truth)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metric, "CHUNK", size)
        cut = metric.score(predictions, truth)
    np.testing.assert_array_equal(whole, cut)


@settings(deadline=None)
@given(PAIR, st.randoms(use_true_random=False))
def test_order_does_not_matter_and_repeats_cost_nothing(pair, random):
    predicted, true = map(upright, pair)
    one = metric.score([predicted], [true])
    shuffled = [*predicted]
    random.shuffle(shuffled)
    other = metric.score([shuffled], [true])
    np.testing.assert_allclose(np.array(one), np.array(other), rtol=1e-6, atol=1e-9)
    twice = metric.score([predicted * 2], [true])
    assert twice.precision[0] >= one.precision[0] - 1e-6
    assert twice.recall[0] == one.recall[0]


def test_lengths_of_many_runs_are_added_as_numpy_adds_them():
    rng = np.random.default_rng(0)
    for runs in (1, 7, 8, 9, 40, 300):
        starts = np.cumsum(rng.random(runs) + 1)
        ends = starts + rng.random(runs)
        expected = np.sum(ends.astype(np.float32) - starts.astype(np.float32))
        found = metric.union_lengths(starts, ends, np.zeros(runs, np.int64), 1)[0]
        assert found == pytest.approx(expected, rel=3e-7)


def test_touching_segments_are_one_before_they_are_rounded():
    starts, ends = np.array([0.1, 0.3]), np.array([0.3, 0.7])
    found = metric.union_lengths(starts, ends, np.zeros(2, np.int64), 1)[0]
    assert found == np.float32(0.7) - np.float32(0.1)
    apart = (np.float32(0.3) - np.float32(0.1)) + (np.float32(0.7) - np.float32(0.3))
    assert found != apart


def test_rates_follow_the_ratio():
    scores = metric.PairScores(np.array([1.0, 0.5, 0, 1]), np.array([0.0, 0.5, 1, 1]))
    assert metric.micro(scores)[3:] == (0.5, 0.5)
    assert metric.micro(scores, 3.0)[3:] == (pytest.approx(1 / 3), 1)
    assert metric.micro(scores, math.inf)[3] == 0.25
    assert math.isnan(metric.micro(scores, math.inf)[4])
    assert math.isnan(metric.micro(scores, 0.0)[3])
    nothing = metric.micro(metric.PairScores(np.zeros(0), np.zeros(0)))
    assert all(map(math.isnan, nothing))
    silent = metric.micro(metric.PairScores(np.ones(2), np.zeros(2)))
    assert silent.f1 == silent.recall == 0
    assert math.isnan(silent.precision)


def test_query_sets_count_each_set_once():
    scores = metric.PairScores(np.array([1.0, 0, 0.5]), np.array([0.0, 1, 0.5]))
    found = metric.macro(scores, "abc", {"x": "ab", "y": "c"})
    assert found == (0.5, 0.5, 0.5, 2)
    with pytest.raises(UserError, match="query set y: pair d was not scored"):
        metric.macro(scores, "abc", {"y": "cd"})


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        ([[[]]], r"pair 0: \[\] is no segment"),
        ([[[0, 0, 1, 1, 0.9]]], "pair 0: .* is no segment: write .query start"),
        ([[[0, 0, 1]]], "is no segment"),
        ([[[0, 0, 1, math.nan]]], "is no segment"),
        ([[[0, 0, 1, math.inf]]], "is no segment"),
        ([[["0", "0", "1", "1"]]], "is no segment"),
        ([[[0, 0, 1, 1], [2]]], r"\[2\] is no segment"),
        ([[5]], "5 is no segment"),
        ([[], []], "2 pairs predicted, 1 labelled"),
    ],
)
def test_what_is_no_segment_is_named(predictions, message):
    with pytest.raises(UserError, match=message):
        metric.score(predictions, [[[0, 0, 1, 1]]])


def test_a_pair_beyond_memory_is_refused(monkeypatch):
    monkeypatch.setattr(metric, "PAIR_LIMIT", 8)
    with pytest.raises(UserError, match="pair 0: 5 segments: give at most 4"):
        metric.score([[[0, 0, 1, 1]] * 5], [[[0, 0, 1, 1]] * 2])
