# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2jax.config import UserError
from m2jax.tasks import ranking
from m2jax.tasks.neighbours import nearest
from m2jax.tasks.ranking import FeatureScores, MatrixScores


def by_sorting(distances, right, ignored):
    """Ranks by a stable sort that puts wrong items first among equals."""
    found = []
    for row, good, bad in zip(distances, right, ignored, strict=True):
        is_right = np.isin(np.arange(len(row)), good)
        order = np.lexsort((is_right, row))
        order = order[~np.isin(order, bad)]
        found.append(np.flatnonzero(np.isin(order, good)))
    return found


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([3, 8, 64]), st.booleans())
def test_ranks_are_those_of_a_sort(seed, tile, ties):
    rng = np.random.default_rng(seed)
    distances = rng.normal(size=(5, 37)).astype(np.float32)
    if ties:
        distances = np.round(distances)
    kinds = rng.integers(0, 4, distances.shape)
    right = [np.flatnonzero(row == 0) for row in kinds]
    ignored = [np.flatnonzero(row == 1) for row in kinds]
    right[2] = right[2][:0]
    found = ranking.hits(MatrixScores(distances), right, ignored, tile=tile, rows=2)
    for got, want in zip(found.ranks, by_sorting(distances, right, ignored), strict=True):
        np.testing.assert_array_equal(got, want)
    assert found.totals.tolist() == [len(each) for each in right]


@pytest.mark.parametrize("metric", ["cosine", "euclid"])
def test_features_rank_as_their_distances(metric):
    rng = np.random.default_rng(0)
    queries, items = (rng.normal(size=(n, 12)).astype(np.float32) for n in (9, 50))
    right = [rng.permutation(50)[:4] for _ in queries]
    q, g = queries.astype(np.float64), items.astype(np.float64)
    if metric == "cosine":
        q, g = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (q, g))
    distances = np.square(q[:, None] - g).sum(-1)
    found = ranking.hits(FeatureScores(queries, items, metric), right, tile=16)
    for got, want in zip(found.ranks, by_sorting(distances, right, [()] * 9), strict=True):
        np.testing.assert_array_equal(got, want)


def test_lists_and_scores_agree():
    rng = np.random.default_rng(1)
    distances = rng.normal(size=(6, 30)).astype(np.float32)
    kinds = rng.integers(0, 4, distances.shape)
    right, ignored = ranking.rows_of(kinds == 0), ranking.rows_of(kinds == 1)
    listed = ranking.hits_in_lists(np.argsort(distances, axis=1), right, ignored)
    scored = ranking.hits(MatrixScores(distances), right, ignored, tile=7)
    for a, b in zip(listed.ranks, scored.ranks, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("right", "ignored", "message"),
    [
        ([[0], [5]], None, "names an item outside 0..3"),
        ([[0], [1, 1]], None, "names an item twice"),
        ([[0], [1]], [[], [1]], "right and ignored at once"),
        ([[0]], None, "one of each per query"),
    ],
)
def test_ground_truth_that_cannot_be(right, ignored, message):
    with pytest.raises(UserError, match=message):
        ranking.hits(MatrixScores(np.zeros((2, 4), np.float32)), right, ignored)


def test_broken_features_are_refused():
    queries, items = np.ones((2, 3), np.float32), np.ones((5, 3), np.float32)
    items[4, 1] = np.nan
    with pytest.raises(UserError, match="not a number"):
        ranking.hits(FeatureScores(queries, items), [[0], [1]], tile=2)
    with pytest.raises(UserError, match="do not fit"):
        FeatureScores(queries, items[:, :2])
    with pytest.raises(UserError, match="metric 'dot'"):
        FeatureScores(queries, items, "dot")
    with pytest.raises(UserError, match="rankings but"):
        ranking.hits_in_lists(np.zeros((2, 4), int), [[0]])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([4, 16, 100]), st.integers(1, 40))
def test_neighbours_are_those_of_a_sort(seed, tile, k):
    rng = np.random.default_rng(seed)
    items = rng.normal(size=(33, 5)).astype(np.float32)
    items[7] = items[3]
    found = nearest(items[:9], items, k, tile=tile, rows=4)
    apart = np.square(items[:9, None].astype(np.float64) - items).sum(-1)
    order = np.argsort(apart, axis=1, kind="stable")[:, : min(k, 33)]
    np.testing.assert_array_equal(found.ids, order)
    np.testing.assert_allclose(found.farthest, apart.max(1), rtol=1e-5)
    np.testing.assert_allclose(found.distances, np.take_along_axis(apart, order, 1))
