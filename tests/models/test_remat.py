# SPDX-License-Identifier: Apache-2.0
"""What the backward pass recomputes changes memory and FLOPs, never the gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from m2jax import config
from m2jax.models import layers, multiway
from m2jax.models.layers import KEPT

WIDTH, ROWS, TOKENS, DEPTH = 32, 2, 5, 3


def cfg(**changes: object) -> config.Model:
    base = config.Model(width=WIDTH, heads=4, dtype="float64", param_dtype="float64")
    return dataclasses.replace(config.resolve(base), **changes)  # type: ignore[arg-type]


def gradient(**changes: object):
    """The gradient function of a stack, and its arguments."""
    model = multiway.Encoder(nnx.Rngs(0), cfg(**changes), DEPTH)
    graph, state = nnx.split(model)

    def loss(state: nnx.State, x: jax.Array) -> jax.Array:
        return jnp.sin(nnx.merge(graph, state)(x, split=multiway.ALL_A).tokens).sum()

    x = jax.random.normal(jax.random.key(1), (ROWS, TOKENS, WIDTH), jnp.float64)
    return jax.grad(loss, argnums=(0, 1)), (state, x)


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def test_every_policy_has_a_name_and_a_meaning() -> None:
    assert set(KEPT) < set(config.REMAT)
    assert config.choices(config.Model, "remat") == tuple(config.REMAT)


@pytest.mark.parametrize(
    "changes", [*({"remat": name} for name in config.REMAT), {"fused_qkv": False}]
)
def test_gradients_agree(changes: dict[str, object]) -> None:
    function, arguments = gradient()
    expected = jax.jit(function)(*arguments)
    other, arguments = gradient(**changes)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12),
        expected,
        jax.jit(other)(*arguments),
    )


def products(jaxpr) -> int:
    """Products of a layer's size or more in a traced function, scans unrolled."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            total += eqn.outvars[0].aval.size >= ROWS * TOKENS * WIDTH
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += eqn.params.get("length", 1) * products(inner)
    return total


def test_policies_recompute_what_they_say() -> None:
    """Forward products again, per layer."""
    counts = {}
    for name in config.REMAT:
        function, arguments = gradient(remat=name, fused_qkv=False)
        counts[name] = products(jax.make_jaxpr(function)(*arguments).jaxpr)
    again = {name: (count - counts["none"]) / DEPTH for name, count in counts.items()}
    assert again["none"] == 0
    assert again["products"] < again["attention"] < again["full"]
    assert again["attention"] - again["products"] == 1  # fc1
    assert again["full"] - again["attention"] >= 4  # q, k, v, out


def test_one_product_or_several() -> None:
    rngs = nnx.Rngs(0)
    norm = layers.LayerNorm(rngs, WIDTH, dtype=jnp.float64)
    linears = [
        layers.Linear(
            rngs, (WIDTH, out), ("embed", "heads"), init=layers.normal(0.1),
            bias_init=layers.uniform(1.0), dtype=jnp.float64,
        )
        for out in (8, 24)
    ]  # fmt: skip
    x = jax.random.normal(jax.random.key(2), (ROWS, TOKENS, WIDTH), jnp.float64)
    together = layers.normed(norm, *linears)(x)
    apart = layers.normed(norm, *linears, fused=False)(x)
    plain = [linear(norm(x)) for linear in linears]
    for a, b, c in zip(together, apart, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-14)
        np.testing.assert_allclose(a, c, rtol=0, atol=1e-13)
