# SPDX-License-Identifier: Apache-2.0
"""Products in 8 bits: as far off as their rounding, with the gradients of the unrounded product."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

pytest.importorskip("aqt", reason="needs the package aqtp")

from m2jax import config
from m2jax.models import multiway, quantised

# AQT's own: it passes arrays where jax now wants dtypes.
pytestmark = pytest.mark.filterwarnings("ignore:Implicit conversion of an array to a dtype")
ROWS, IN, OUT = 6, 64, 48
# Half a step of the largest value of a row (int8), or of each value's own size (3 bits of e4m3).
STEP = {"int8": 0.5 / 127, "fp8": 2.0**-4}
NARROW = {"int8": "i8", "fp8": "f8_e4m3fn"}


def numbers(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_the_product_is_as_far_off_as_its_rounding(kind) -> None:
    x, kernel = numbers(0, 2, ROWS, IN), numbers(1, IN, OUT)
    x = x * jnp.logspace(-3, 3, ROWS)[:, None]  # rows of very different sizes have own scales
    found, exact = quantised.product(x, kernel, kind), x @ kernel
    if kind == "int8":
        off_x, off_k = jnp.abs(x).max(-1, keepdims=True), jnp.abs(kernel).max(0, keepdims=True)
        off_x, off_k = jnp.full_like(x, 1) * off_x, jnp.full_like(kernel, 1) * off_k
    else:
        off_x, off_k = jnp.abs(x), jnp.abs(kernel)
    off_x, off_k = STEP[kind] * off_x, STEP[kind] * off_k
    most = off_x @ jnp.abs(kernel) + jnp.abs(x) @ off_k + off_x @ off_k
    assert (jnp.abs(found - exact) <= 1.01 * most).all()
    share = jnp.abs(found - exact).mean() / jnp.abs(exact).mean()
    assert 1e-4 < share < 0.1  # rounded, and not by much


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_gradients_are_those_of_the_unrounded_product(kind) -> None:
    x, kernel, weight = numbers(2, ROWS, IN), numbers(3, IN, OUT), numbers(4, ROWS, OUT)

    def loss(kind):
        return lambda x, kernel: (weight * quantised.product(x, kernel, kind)).sum()

    found, exact = (jax.grad(loss(each), argnums=(0, 1))(x, kernel) for each in (kind, ""))
    for one, other in zip(found, exact, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["", "int8", "fp8"])
def test_the_encoder_multiplies_in_the_type_that_the_config_names(kind) -> None:
    cfg = config.resolve(config.Model(width=32, heads=4, products=kind))
    model = multiway.Encoder(nnx.Rngs(0), dataclasses.replace(cfg, dtype="float32"), 2)
    tokens = numbers(5, 2, 5, 32)
    program = str(jax.make_jaxpr(lambda x: model(x, split=multiway.ALL_A).tokens)(tokens))
    for each, name in NARROW.items():
        assert (f"{name}[" in program) == (each == kind)
