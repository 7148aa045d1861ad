# SPDX-License-Identifier: Apache-2.0
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2jax.config import UserError
from m2jax.data import order as order_lib
from m2jax.data.order import PERIOD, Order


@given(weights=st.lists(st.floats(0.05, 10), min_size=1, max_size=5), start=st.integers(0, 10**9))
@settings(max_examples=8, deadline=None)
def test_sources_come_by_weight_and_never_far_from_it(weights, start):
    order = Order([7 + i for i in range(len(weights))], weights, seed=1)
    assert sum(order.counts) == PERIOD
    shares = np.asarray(weights) / sum(weights)
    np.testing.assert_allclose(np.asarray(order.counts) / PERIOD, shares, atol=1 / PERIOD)
    begin = start // PERIOD * PERIOD
    part = order.at(np.arange(begin, begin + PERIOD)).part
    seen = (part[:, None] == np.arange(len(weights))).cumsum(0)
    due = np.arange(1, PERIOD + 1)[:, None] * np.asarray(order.counts) / PERIOD
    assert np.abs(seen - due).max() <= len(weights)
    assert tuple(seen[-1]) == order.counts


@pytest.mark.parametrize("sizes", [[5], [5, 13], [1, 2, 30]])
def test_every_epoch_of_every_source_is_whole_and_in_a_new_order(sizes):
    order = Order(sizes, [1.0, 2.0, 4.0][: len(sizes)], seed=3)
    found = order.at(np.arange(2000))
    for part, size in enumerate(sizes):
        rows = found.row[found.part == part]
        epochs = rows[: len(rows) // size * size].reshape(-1, size)
        np.testing.assert_array_equal(np.sort(epochs, axis=1), [range(size)] * len(epochs))
        if size > 4:
            assert len(np.unique(epochs[:20], axis=0)) > 10


def test_a_place_is_the_same_whatever_is_asked_with_it():
    order = Order([50, 20], [0.7, 0.3], seed=5)
    whole = order.at(np.arange(3000))
    for places in (np.arange(2990, 3000), np.array([0, 1500, 999, 1000, 1001])):
        some = order.at(places)
        np.testing.assert_array_equal(some.part, whole.part[places])
        np.testing.assert_array_equal(some.row, whole.row[places])
    other = Order([50, 20], [0.7, 0.3], seed=6).at(np.arange(3000))
    assert (other.row != whole.row).mean() > 0.8


@pytest.mark.parametrize("weights", [[], [1.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [1.0, 1e-4]])
def test_weights_that_cannot_be_are_refused(weights):
    with pytest.raises(UserError, match=r"data\.mixture: weight"):
        Order([5] * len(weights), weights, seed=0)


def test_a_large_source_is_whole_and_in_a_new_order_without_a_permutation(monkeypatch):
    monkeypatch.setattr(order_lib, "LARGE", 60)
    order = Order([60, 59], [1.0, 1.0], seed=3)
    monkeypatch.setattr(order_lib.Order, "_permutation", lambda *args: np.arange(59))
    found = order.at(np.arange(240))
    epochs = found.row[found.part == 0].reshape(2, 60)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), [range(60)] * 2)
    assert (epochs[0] != epochs[1]).mean() > 0.8
    assert (epochs[0] != np.arange(60)).mean() > 0.8
    billions = Order([6_000_000_000], [1.0], seed=3).at(np.arange(1000)).row
    assert len(set(billions)) == 1000
    assert billions.max() > 5e9


def test_threads_share_one_permutation(monkeypatch):
    order, made = Order([1000], [1.0], seed=3), []
    default_rng = np.random.default_rng

    def slow(seed):
        made.append(seed)
        time.sleep(0.05)
        return default_rng(seed)

    monkeypatch.setattr(order_lib.np.random, "default_rng", slow)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(order.at, [np.arange(8)] * 8))
    assert made == [(3, 0, 0)]
