# SPDX-License-Identifier: Apache-2.0
"""The cross-entropy that never holds its logits equals the one that does."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from jax.test_util import check_grads

from m2jax import config
from m2jax.dist.mesh import make_mesh
from m2jax.losses.language import linear_cross_entropy


def plain(hidden, table, target, weight, words):
    """The formula in NumPy, float64."""
    logits = np.asarray(hidden, np.float64) @ np.asarray(table, np.float64)[:words].T
    top = logits.max(-1, keepdims=True)
    log_p = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    lost = -np.take_along_axis(log_p, target[..., None] % words, -1)[..., 0]
    return (lost * weight).sum() / max(weight.sum(), 1)


def problem(batch, length, dim, rows, words, seed=0):
    rng = np.random.default_rng(seed)
    hidden, table = rng.normal(size=(batch, length, dim)), rng.normal(size=(rows, dim))
    target = rng.integers(0, words, (batch, length))
    weight = (rng.random((batch, length)) < 0.7).astype(np.float64)
    return hidden, table, target, weight


@settings(deadline=None, max_examples=20)
@given(
    st.integers(1, 3), st.integers(1, 7), st.integers(1, 9), st.integers(0, 5), st.integers(0, 99)
)
def test_value_is_the_formulas_for_any_cut(batch, length, positions, padding, seed):
    hidden, table, target, weight = problem(batch, length, 4, 6 + padding, 6, seed)
    with jax.enable_x64(True):
        found = linear_cross_entropy(
            *map(jnp.asarray, (hidden, table, target, weight)), vocab_size=6, positions=positions
        )
    np.testing.assert_allclose(found, plain(hidden, table, target, weight, 6), rtol=1e-12)


@pytest.mark.parametrize("positions", [1, 3, 8])
def test_gradients_are_those_of_the_whole_matrix(positions):
    hidden, table, target, weight = problem(3, 8, 5, 16, 11)

    def whole(h, t):
        log_p = jax.nn.log_softmax(h @ t[:11].T)
        lost = -jnp.take_along_axis(log_p, target[..., None], -1)[..., 0]
        return (lost * weight).sum() / weight.sum()

    def cut(h, t):
        return linear_cross_entropy(
            h, t, jnp.asarray(target), jnp.asarray(weight), vocab_size=11, positions=positions
        )

    with jax.enable_x64(True):
        arrays = jnp.asarray(hidden), jnp.asarray(table)
        expected = jax.value_and_grad(whole, argnums=(0, 1))(*arrays)
        found = jax.jit(jax.value_and_grad(cut, argnums=(0, 1)))(*arrays)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14), found, expected
    )


def test_a_vocabulary_split_over_devices_gives_the_same_and_is_not_collected():
    mesh = make_mesh(config.Mesh(data=2, fsdp=2, model=2))
    hidden, table, target, weight = problem(8, 6, 16, 512, 500)
    places = [
        PartitionSpec(("data", "fsdp")),
        PartitionSpec("model", "fsdp"),
        PartitionSpec(("data", "fsdp")),
        PartitionSpec(("data", "fsdp")),
    ]
    kinds = (np.float32, np.float32, np.int32, np.float32)
    arrays = [
        jax.device_put(x.astype(kind), NamedSharding(mesh, place))
        for x, kind, place in zip((hidden, table, target, weight), kinds, places, strict=True)
    ]

    def loss(hidden, table, target, weight):
        return linear_cross_entropy(hidden, table, target, weight, vocab_size=500, positions=2)

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    value, grads = gradient(*arrays)
    np.testing.assert_allclose(value, plain(hidden, table, target, weight, 500), rtol=1e-5)
    one = jax.value_and_grad(loss, argnums=(0, 1))(*map(np.asarray, arrays))[1]
    for a, b in zip(grads, one, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    # A device holds 256 words of 2 rows at 2 places; nothing holds all words at every place.
    text = gradient.lower(*arrays).compile().as_text()
    assert "f32[2,2,256]" in text
    assert not any(f"f32[{b},6,{v}]" in text for b in (2, 4, 8) for v in (256, 512))
    assert "[2,2,512]" not in text


def test_a_place_that_does_not_count_may_hold_any_number():
    """Also the id of a row that is no word, whose loss is infinite."""
    hidden, table, target, weight = problem(2, 5, 4, 8, 6)
    weight[0, 2] = weight[1, 4] = 0
    target[0, 2], target[1, 4] = 7, -1

    def loss(hidden, table):
        return linear_cross_entropy(
            hidden, table, jnp.asarray(target), jnp.asarray(weight), vocab_size=6, positions=2
        )

    with jax.enable_x64(True):
        arrays = jnp.asarray(hidden), jnp.asarray(table)
        value, grads = jax.value_and_grad(loss, argnums=(0, 1))(*arrays)
        check_grads(loss, arrays, order=1, modes=["rev"], atol=1e-8, rtol=1e-6)
    np.testing.assert_allclose(value, plain(hidden, table, target, weight, 6), rtol=1e-12)
    np.testing.assert_array_equal(grads[0][0, 2], 0)
    np.testing.assert_array_equal(grads[1][6:], 0)


@pytest.mark.parametrize("positions", [1, 3])
def test_no_array_holds_the_logits_of_more_places_than_asked(positions):
    """Neither forward nor kept for the backward pass, stacked or not."""
    batch, length, rows = 2, 12, 1024
    arrays = [jnp.asarray(x) for x in problem(batch, length, 8, rows, 1000)]

    def loss(hidden, table):
        return linear_cross_entropy(
            hidden, table, *arrays[2:], vocab_size=1000, positions=positions
        )

    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*arrays[:2]).compile().as_text()
    shapes = {tuple(map(int, found.split(","))) for found in re.findall(r"\w\d+\[([\d,]+)\]", text)}
    sizes = [math.prod(shape) for shape in shapes if rows in shape]
    assert max(sizes) == max(batch * positions * rows, 8 * rows)  # the table's gradient is 8 wide


def test_no_token_costs_nothing():
    hidden, table, target, _ = problem(2, 3, 4, 8, 8)
    loss, grads = jax.value_and_grad(linear_cross_entropy, argnums=(0, 1))(
        jnp.asarray(hidden), jnp.asarray(table), jnp.asarray(target), jnp.zeros((2, 3))
    )
    assert loss == 0
    jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0), grads)
