# SPDX-License-Identifier: Apache-2.0
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2jax.config import UserError
from m2jax.tasks.reid import samplers
from m2jax.tasks.reid.prototypes import Prototypes, moved
from m2jax.tasks.reid.train import Identities, Recipe
from tests.losses.reductions import mesh_of


def alike(seed, identities):
    vectors = np.random.default_rng(seed).normal(size=(identities, 6))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return lambda anchor: vectors @ vectors[anchor]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=3, max_size=12),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(0, 10**6),
    st.sampled_from(["pk", "window", "nearest"]),
)
def test_batches_hold_p_identities_of_k_images(counts, p, k, seed, name):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    rng = np.random.default_rng(seed + 1)
    if name == "pk":
        batches = [*samplers.pk(labels, p, k, rng)]
    else:
        batches = [*samplers.SAMPLERS[name](labels, p, k, rng, alike(seed, len(counts)))]
    groups = samplers.counts_of_groups(np.array(counts), k)
    taken = np.zeros(len(counts), int)
    for batch in batches:
        who = labels[batch].reshape(p, k)
        assert (who == who[:, :1]).all()
        assert len(set(who[:, 0])) == p
        taken[who[:, 0]] += 1
    assert (taken <= groups).all()
    assert (taken < groups).sum() < p
    rows = np.concatenate(batches)
    enough = np.array(counts)[labels[rows]] >= k
    assert len(set(rows[enough])) == enough.sum()


def test_the_window_stays_until_its_shortest_is_used_up():
    order = [*samplers.window_order(np.array([1.0, 0.9, 0.8, 0.1]), np.array([3, 1, 2, 9]), 2)]
    assert [each.tolist() for each in order] == [[0, 1], [0, 2], [0, 2]]


def test_every_batch_of_the_nearest_variant_is_alike():
    """Identities in tight pairs: P = 2 always finds the partner; the window does not."""
    vectors = np.repeat(np.eye(6), 2, axis=0)

    def similarities(anchor):
        return vectors @ vectors[anchor]

    labels = np.repeat(np.arange(12), 2)
    rng = np.random.default_rng(0)
    for batch in samplers.nearest_classes(labels, 2, 2, rng, similarities):
        first, second = labels[batch].reshape(2, 2)[:, 0] // 2
        assert first == second


def test_epochs_differ_in_groups_and_anchors():
    """What is left over after the last whole group is left over by chance, and so is the start."""
    labels = np.repeat(np.arange(6), 5)
    taken, starts = np.zeros(30, int), {"window": set(), "nearest": set()}
    for seed in range(40):
        chunks = samplers.Chunks(labels, 2, np.random.default_rng(seed))
        for identity in range(6):
            taken[chunks.take(identity)] += 1
        for name, found in starts.items():
            rng = np.random.default_rng(seed)
            first = next(samplers.SAMPLERS[name](labels, 2, 2, rng, alike(0, 6)))
            found.add(int(labels[first[0]]))
    assert (taken > 0).all()
    assert starts == {name: {*range(6)} for name in starts}


@pytest.mark.parametrize(
    ("labels", "p", "k", "message"),
    [
        ([0, 0, 2], 1, 1, "identity 1 has no image"),
        ([0, 1], 3, 1, "P=3 of 2 identities"),
        ([0, 1], 1, 0, "K=0"),
        ([], 1, 1, "of 0 images"),
    ],
)
def test_samplers_that_cannot_be(labels, p, k, message):
    with pytest.raises(UserError, match=message):
        next(samplers.pk(np.array(labels, int), p, k, np.random.default_rng(0)))


def test_an_epochs_order_is_its_own_and_the_same_again():
    labels, recipe = np.repeat(np.arange(6), 4), Recipe(p=3, k=2)
    order = Identities(labels, recipe, 16, None)
    first, again, second = (np.stack(order(epoch, {})) for epoch in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, second)
    other = Identities(labels, dataclasses.replace(recipe, seed=1), 16, None)
    assert not np.array_equal(first, np.stack(other(0, {})))


@pytest.mark.parametrize("mesh_name", [None, "ring of 8"])
def test_prototypes(mesh_name):
    """Cosines of a refreshed classifier, on one device and spread over eight."""
    mesh = None if mesh_name is None else mesh_of(mesh_name)
    held = Prototypes(13, 4, jax.random.key(0), mesh=mesh)
    assert held.similarities(3).argmax() == 3
    weights = np.random.default_rng(0).normal(size=(13, 4)).astype(np.float32)
    placed = jnp.asarray(weights)
    held.refresh(placed)
    placed.delete()  # as a trainer that donates its parameters does
    unit = weights / np.linalg.norm(weights, axis=1, keepdims=True)
    np.testing.assert_allclose(held.similarities(5), unit @ unit[5], atol=1e-6)
    with pytest.raises(UserError, match="give one row per identity"):
        held.refresh(jnp.zeros((12, 4)))


def test_running_means_take_the_first_batch_whole():
    rows = jnp.asarray([[1.0, 1], [2, 2], [0, 0], [0, 0]])
    features = jnp.asarray([[3.0, 5], [5, 3], [7, 9], [6, 6]])
    found = moved(rows, features, jnp.asarray([1, 1, 2, 1]), momentum=0.75)
    mean = np.mean([[3, 5], [5, 3], [6, 6]], axis=0)
    expected = [[1, 1], 0.75 * np.array([2, 2]) + 0.25 * mean, [7, 9], [0, 0]]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
