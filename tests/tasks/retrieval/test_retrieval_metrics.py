# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2jax.config import UserError
from m2jax.tasks import ranking
from m2jax.tasks.retrieval import metrics
from m2jax.tasks.retrieval.compatibility import Measured, compatibility


def hits(*ranks, totals=None):
    ranks = [np.array(each, np.int64) for each in ranks]
    return ranking.Hits(ranks, np.array(totals or [len(each) for each in ranks]))


def test_by_hand():
    """Right items at ranks 1 and 3 of a ranking."""
    trapezoid = ((1 / 2 + 0 / 1) / 2 + (2 / 4 + 1 / 3) / 2) / 2
    assert metrics.trapezoid(np.array([1, 3]), 2) == pytest.approx(trapezoid)
    found = metrics.mean_ap_at(hits([1, 3], [0, 150], []), 100)
    assert found.ap.tolist() == pytest.approx([(1 / 2 + 2 / 4) / 2, 1 / 2, 0])
    assert found.mean_ap == pytest.approx(found.ap.mean())
    assert metrics.mean_ap_at(hits([0], totals=[500]), 10).ap.tolist() == [0.1]
    assert metrics.precision_at(np.array([0, 3]), 10) == 2 / 4
    assert metrics.precision_at(np.array([0, 3]), 2) == 1 / 2


@settings(max_examples=50, deadline=None)
@given(st.sets(st.integers(0, 60), min_size=1, max_size=20))
def test_bounds_and_order(ranks):
    """A better ranking never scores less; a perfect one scores 1."""
    ranks = np.array(sorted(ranks))
    best = np.arange(len(ranks))
    for measure in (
        lambda r: metrics.trapezoid(r, len(r)),
        lambda r: metrics.mean_ap_at(hits(r), 100).mean_ap,
    ):
        assert measure(best) == pytest.approx(1)
        assert 0 <= measure(ranks) <= 1 + 1e-12
        moved = ranks.copy()
        moved[0] = max(moved[0] - 1, 0)
        assert measure(moved) >= measure(ranks) - 1e-12


def test_protocols_partition_the_truth():
    truth = metrics.Truth([[0, 1]], [[2]], [[3]])
    want = {"easy": ([0, 1], [3, 2]), "medium": ([0, 1, 2], [3]), "hard": ([2], [3, 0, 1])}
    for name, (right, ignored) in want.items():
        found = metrics.protocol(truth, name)
        assert [each.tolist() for (each,) in found] == [right, ignored]
    with pytest.raises(UserError, match="use one of easy, medium, hard"):
        metrics.protocol(truth, "E")
    with pytest.raises(UserError, match="at least 1"):
        metrics.mean_ap_at(hits([0]), 0)


def test_queries_without_right_items_are_left_out_of_revisited_means():
    truth = metrics.Truth([[0], []], [[], []], [[], [0]])
    ranked = np.array([[1, 0, 2], [0, 1, 2]])
    found = metrics.revisited(truth, lambda *two: ranking.hits_in_lists(ranked, *two))
    assert found["easy"].mean_ap == pytest.approx(0.25)
    assert np.isnan(found["easy"].ap[1])
    assert np.isnan(found["hard"].mean_ap)


def test_compatibility_scores_of_special_cases():
    """As good as alone and no better across: 50; P_1 is taken per data set."""
    same = Measured(old=0.2, new=0.5, cross=0.2, alone=0.5)
    assert compatibility([same]) == pytest.approx((50, 50, 50))
    better = same._replace(cross=0.5, new=0.6)
    both = compatibility({"a": same, "b": better})
    each = compatibility([better])
    assert both.p_1 == pytest.approx((50 + each.p_1) / 2)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ({}, "no data set"),
        ({"x": Measured(0.5, 0.5, 0.5, 0.4)}, "x: the model trained alone"),
        ({"x": Measured(-1.0, 0.5, 0.5, 0.0)}, "no better than the old"),
        ({"x": Measured(0.5, float("nan"), 0.5, 0.6)}, "not a number"),
    ],
)
def test_scores_that_mean_nothing_are_refused(sets, message):
    with pytest.raises(UserError, match=message):
        compatibility(sets)
