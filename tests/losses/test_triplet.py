# SPDX-License-Identifier: Apache-2.0
"""The hardest pairs of a whole mesh are those of the dense loss: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from m2jax.losses.triplet import batch_hard
from tests.losses.reductions import mesh_of

ROWS = ("replica", "data", "fsdp")


def dense(features, labels, margin):
    """The definition over all pairs, differentiated by jax itself."""
    gap = features[:, None] - features
    apart = jnp.sqrt(jnp.maximum(jnp.square(gap).sum(-1), 1e-12))
    same = labels[:, None] == labels
    at = jnp.argmax(jnp.where(same, apart, -jnp.inf), axis=1)
    positive = jnp.take_along_axis(apart, at[:, None], axis=1)[:, 0]
    at = jnp.argmin(jnp.where(same, jnp.inf, apart), axis=1)
    negative = jnp.take_along_axis(apart, at[:, None], axis=1)[:, 0]
    if margin is None:
        return jax.nn.softplus(positive - negative).mean()
    return jax.nn.relu(positive - negative + margin).mean()


def batch(seed, n=64, dim=16, identities=9):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, dim)), rng.integers(0, identities, n)


@pytest.mark.parametrize("mesh_name", [1, 8, "ring of 8", "copies"])
@pytest.mark.parametrize("margin", [None, 0.3])
def test_equal_to_dense(mesh_name, margin):
    mesh = mesh_of(mesh_name)
    rows = NamedSharding(mesh, PartitionSpec(ROWS))
    with jax.enable_x64(True):
        features, labels = batch(0)
        want = jax.value_and_grad(dense)(jnp.asarray(features), labels, margin)

        def loss(x, y):
            return batch_hard(x, y, margin=margin, mesh=mesh).loss

        placed = jax.device_put(features, rows), jax.device_put(labels, rows)
        found = jax.jit(jax.value_and_grad(loss))(*placed)
    np.testing.assert_allclose(found[0], want[0], rtol=1e-12)
    np.testing.assert_allclose(found[1], want[1], atol=1e-13)


def test_of_equal_distances_the_first_row_is_taken():
    """Repeated rows on different devices: one partner gets the gradient, the dense loss's."""
    mesh = mesh_of("ring of 8")
    rows = NamedSharding(mesh, PartitionSpec(ROWS))
    features, labels = batch(1, n=16, identities=4)
    features = np.round(features)  # whole numbers: distances are the same bits everywhere
    features[8:] = features[:8]
    labels[8:] = labels[:8]
    want = jax.grad(lambda x: batch_hard(x, labels).loss)(features.astype(np.float32))

    def loss(x, y):
        return batch_hard(x, y, mesh=mesh).loss

    placed = jax.device_put(features.astype(np.float32), rows), jax.device_put(labels, rows)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(*placed), want, atol=1e-6)


def test_anchors_without_a_negative_count_for_nothing():
    features, labels = np.eye(4, dtype=np.float32), np.zeros(4, int)
    value, grad = jax.value_and_grad(lambda x: batch_hard(x, labels).loss)(features)
    assert value == 0
    assert not np.asarray(grad).any()
    assert np.isinf(batch_hard(features, labels).negative).all()


def test_no_device_holds_the_features_of_all():
    """The compiled step gathers nothing; what travels are blocks of one device's rows."""
    mesh = mesh_of("ring of 8")
    rows = NamedSharding(mesh, PartitionSpec(ROWS))

    def loss(x, y):
        return batch_hard(x, y, mesh=mesh).loss

    shapes = (
        jax.ShapeDtypeStruct((512, 64), jnp.float32, sharding=rows),
        jax.ShapeDtypeStruct((512,), jnp.int32, sharding=rows),
    )
    text = jax.jit(jax.grad(loss)).lower(*shapes).compile().as_text()
    assert "f32[64,64]" in text
    assert "f32[512,64]" not in text
    assert "all-gather" not in text
