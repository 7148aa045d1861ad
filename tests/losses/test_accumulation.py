# SPDX-License-Identifier: Apache-2.0
"""Two-pass accumulation is the big batch; ``detach`` is what its definition says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2jax.losses.accumulation import merge, split, value_and_grad
from m2jax.losses.contrastive import contrastive_loss
from tests.losses.reductions import mesh_of

ROWS, WIDTH = 48, 6


def encode(params, batch, rng):
    """A nonlinear tower per side."""
    del rng
    hidden = {name: jnp.tanh(batch[name] @ params[name]) for name in ("image", "text")}
    return {k: x / jnp.linalg.norm(x, axis=1, keepdims=True) for k, x in hidden.items()}


def contrast(params, features, batch, **options):
    if "ids" in options:
        options["ids"] = batch["ids"]
    scale = jnp.exp(params["log_scale"])
    loss = contrastive_loss(features["image"], features["text"], scale, **options)
    return loss, {"scale": scale}


def problem(seed=0):
    rng = np.random.default_rng(seed)
    params = {name: jnp.asarray(rng.normal(size=(WIDTH, 4))) for name in ("image", "text")}
    params["log_scale"] = jnp.asarray(np.log(30.0))
    batch = {name: jnp.asarray(rng.normal(size=(ROWS, WIDTH))) for name in ("image", "text")}
    return params, batch | {"ids": jnp.asarray(rng.integers(0, 20, ROWS))}


def close(found, expected):
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))  # NaN would equal NaN
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-13), found, expected
    )


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(
    "options", [{"impl": "dense"}, {"impl": "ring", "ids": True}, {"impl": "grouped", "group": 2}]
)
def test_equals_the_gradient_of_the_whole_batch(count, options):
    with jax.enable_x64(True):
        mesh = mesh_of(8)
        params, batch = problem()
        loss = functools.partial(contrast, mesh=mesh, **options)
        whole = jax.value_and_grad(lambda p: loss(p, encode(p, batch, None), batch), has_aux=True)
        parts = value_and_grad(encode, loss, count=count, mesh=mesh)
        close(jax.jit(parts)(params, batch, jax.random.key(0)), jax.jit(whole)(params))


def test_detach_lets_the_last_micro_batch_alone_learn():
    with jax.enable_x64(True):
        params, batch = problem(1)
        count, last = 3, slice(2 * ROWS // 3, None)
        loss = functools.partial(contrast, ids=True)  # the order of rows must be the batch's

        def by_hand(p):
            fixed = jax.lax.stop_gradient(encode(p, batch, None))
            live = encode(p, {k: x[last] for k, x in batch.items()}, None)
            return loss(p, {k: fixed[k].at[last].set(live[k]) for k in fixed}, batch)

        parts = value_and_grad(encode, loss, count=count, detach=True)
        found = jax.jit(parts)(params, batch, jax.random.key(0))
        close(found, jax.jit(jax.value_and_grad(by_hand, has_aux=True))(params))
        exact = value_and_grad(encode, loss, count=count)(params, batch, jax.random.key(0))
        assert not np.allclose(found[1]["image"], exact[1]["image"], rtol=0.1)


def test_both_passes_of_a_micro_batch_see_the_same_random_numbers():
    """With noise in the encoder the gradient is that of one well-defined function of the key."""

    def noisy(params, batch, rng):
        noise = jax.random.normal(rng, batch["image"].shape)
        return encode(params, batch | {"image": batch["image"] + noise}, None)

    with jax.enable_x64(True):
        params, batch = problem(2)
        key = jax.random.key(3)

        def whole(p):
            parts = zip(jax.random.split(key, 2), range(2), strict=True)
            halves = [
                noisy(p, {k: x[i * 24 : (i + 1) * 24] for k, x in batch.items()}, k)
                for k, i in parts
            ]
            return contrast(p, jax.tree.map(lambda *x: jnp.concatenate(x), *halves), batch)

        found = value_and_grad(noisy, contrast, count=2)(params, batch, key)
        close(found, jax.value_and_grad(whole, has_aux=True)(params))


def test_micro_batches_take_an_equal_part_of_every_device_and_move_no_row():
    mesh = mesh_of(4)
    parts = split(jnp.arange(24), 3, mesh)
    np.testing.assert_array_equal(parts[0], [0, 1, 6, 7, 12, 13, 18, 19])
    np.testing.assert_array_equal(merge(parts, mesh), jnp.arange(24))
    rows = jax.NamedSharding(mesh, jax.P(("replica", "data", "fsdp")))
    there_and_back = jax.jit(
        lambda x: merge(2 * split(x, 3, mesh), mesh), in_shardings=rows, out_shardings=rows
    )
    text = there_and_back.lower(jnp.zeros((24, 5))).compile().as_text()
    assert not any(name in text for name in ("all-gather", "all-to-all", "permute", "all-reduce"))
