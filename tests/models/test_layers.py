# SPDX-License-Identifier: Apache-2.0
"""The same mathematics in two ways: each way gives what the plain one gives."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from m2jax import config
from m2jax.dist.mesh import make_mesh
from m2jax.dist.sharding import AxisRules, batch_sharding, use_rules
from m2jax.models import layers

RNG = np.random.default_rng(0)
SAMPLES, LENGTH, HEADS, DIM = 7, 6, 2, 4


def numbers(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


BIASES = {
    "none": None,
    "own": jnp.where(numbers(SAMPLES, 1, 1, LENGTH) > 0.5, -jnp.inf, 0.0),
    "shared": jnp.where(jnp.tri(LENGTH) > 0, 0.0, -1e9)[None, None],
}


@pytest.mark.parametrize("loops", [True, False])
@pytest.mark.parametrize("bias", BIASES)
def test_attention_by_sample_is_attention(monkeypatch, bias, loops):
    scores = HEADS * LENGTH * LENGTH * 4
    monkeypatch.setattr(layers, "LOOP_BYTES", scores if loops else scores + 1)
    q, k, v = (numbers(SAMPLES, LENGTH, HEADS, DIM) for _ in range(3))
    program = jax.make_jaxpr(lambda *qkv: layers.attention_by_sample(*qkv, bias=BIASES[bias]))
    assert ("scan" in str(program(q, k, v))) == loops
    found, wanted = (
        layers.ATTENTION[name](q, k, v, bias=BIASES[bias]) for name in ("sample", "batch")
    )
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rows", [3, 40])
def test_a_folded_norm_is_the_norm(rows):
    """Below and above the number of columns, of which two linears together have 24."""
    rngs, init = nnx.Rngs(0), layers.normal(1.0)
    norm = layers.LayerNorm(rngs, 8)
    norm.scale[...], norm.bias[...] = numbers(8), numbers(8)
    linears = [
        layers.Linear(rngs, (8, out), (None, None), init=init, bias_init=init) for out in (16, 8)
    ]
    x = numbers(1, rows, 8) * 3
    found = layers.normed(norm, *linears)(x)
    wide = np.asarray(x, np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    y = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + norm.eps)
    y = y * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...])
    for linear, part in zip(linears, found, strict=True):
        wanted = y @ np.asarray(linear.kernel[...], np.float64) + np.asarray(linear.bias[...])
        np.testing.assert_allclose(part, wanted, rtol=0, atol=2e-5)


PLACED = [{"data": 2, "fsdp": 4}, {"replica": 2, "fsdp": 2, "model": 2}, {"data": 4, "model": 2}]


@pytest.mark.parametrize("sizes", PLACED, ids=str)
@pytest.mark.parametrize(("inner", "dtype"), [((), "float32"), ((3,), "bfloat16")], ids=str)
def test_a_lookup_is_indexing_wherever_the_table_lies(sizes, inner, dtype):
    """Rows and gradient, also where the table is used a second time, as a tied decoder does.

    The gradient is summed in the table's precision, whatever the activations'.
    """
    mesh, rules = make_mesh(config.Mesh(**{"data": 1, **sizes})), AxisRules()
    table, change = numbers(24, 8), numbers(16, *inner, 8).astype(dtype)
    ids = jnp.asarray(RNG.integers(0, 12, (16, *inner)), jnp.int32)  # each word more than once
    place = rules.sharding(mesh, ("vocab", "embed"), table.shape)

    def loss(table, ids, change):
        with use_rules(mesh, rules):
            found = layers.lookup(table, ids, jnp.dtype(dtype))
        return (found * change).sum() + jnp.square(table).sum() / 2, found

    inputs = (place, batch_sharding(mesh), batch_sharding(mesh))
    outputs = (place, batch_sharding(mesh))
    gradient = (
        jax.jit(jax.grad(loss, has_aux=True), in_shardings=inputs, out_shardings=outputs)
        .lower(table, ids, change)
        .compile()
    )
    got, found = gradient(*jax.device_put((table, ids, change), inputs))
    np.testing.assert_array_equal(found, table.astype(dtype)[ids])
    wanted = np.asarray(table, np.float64)
    np.add.at(wanted, np.asarray(ids).ravel(), np.asarray(change, np.float64).reshape(-1, 8))
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)
    # No device ever holds the whole table or its gradient, nor what all devices looked up.
    text = gradient.as_text()
    assert text
    assert not re.search(rf"\[24,8\]|\[{','.join(map(str, change.shape))}\]", text)
