# SPDX-License-Identifier: Apache-2.0
"""Every form of attention is the same function; what a backend lacks is refused in one line."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo as kernels

from m2jax import config, load_config
from m2jax.config import UserError
from m2jax.dist.mesh import make_mesh
from m2jax.models import fused_attention, layers, multiway
from m2jax.models.layers import ATTENTION
from m2jax.train.image_text import ImageTextTask
from m2jax.train.step import make_step

RNG = np.random.default_rng(0)
SAMPLES, HEADS, DIM = 3, 2, 8
HERE = sorted(set(ATTENTION) - {"cudnn"})  # of which this machine's CPU is capable


def numbers(*shape, dtype=jnp.float32):
    return jnp.asarray(RNG.normal(size=shape), dtype)


def biases(queries, keys):
    """None, padding of each sample, and what a query must not see."""
    padding = np.where(np.arange(keys) < RNG.integers(1, keys, (SAMPLES, 1)), 0.0, -np.inf)
    order = np.arange(queries)[:, None] >= np.arange(keys)[None]
    blocked = np.where(order, 0.0, -1e8)
    return [None, jnp.asarray(padding)[:, None, None, :], jnp.asarray(blocked)[None, None]]


def reference(q, k, v, bias):
    """In float64, by NumPy."""
    q, k, v = (np.asarray(x, np.float64).swapaxes(1, 2) for x in (q, k, v))
    scores = q @ k.swapaxes(2, 3) / np.sqrt(q.shape[-1])
    scores = scores if bias is None else scores + np.asarray(bias, np.float64)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True) @ v).swapaxes(1, 2)


def test_every_form_has_a_name_and_a_meaning():
    assert set(config.ATTENTION) == set(ATTENTION)
    assert config.choices(config.Model, "attention") == tuple(config.ATTENTION)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("queries", [7, 12])
@pytest.mark.parametrize("name", HERE)
def test_forms_agree_with_the_formula(name, queries, dtype, monkeypatch):
    monkeypatch.setattr(layers, "LOOP_BYTES", 1)
    q, k, v = (numbers(SAMPLES, n, HEADS, DIM, dtype=dtype) for n in (queries, 12, 12))
    most = 2e-6 if dtype == jnp.float32 else 2e-2  # of rounding weights and sums to 8 bits
    for bias in biases(queries, 12):
        found = ATTENTION[name](q, k, v, bias=bias)
        assert found.dtype == dtype
        assert found.shape == q.shape
        np.testing.assert_allclose(
            np.asarray(found, np.float64), reference(q, k, v, bias), rtol=0, atol=most
        )


@pytest.mark.parametrize("name", HERE)
def test_gradients_agree(name, monkeypatch):
    monkeypatch.setattr(layers, "LOOP_BYTES", 1)
    inputs = [numbers(SAMPLES, 6, HEADS, DIM) for _ in range(3)]
    weight = numbers(SAMPLES, 6, HEADS, DIM)
    for bias in biases(6, 6):

        def loss(q, k, v, form, bias=bias):
            return (weight * form(q, k, v, bias=bias)).sum()

        found, wanted = (
            jax.grad(loss, argnums=(0, 1, 2))(*inputs, form)
            for form in (ATTENTION[name], layers.attention)
        )
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=5e-6)


def test_cudnn_is_refused_in_one_line_where_there_is_none():
    q = numbers(1, 4, HEADS, DIM, dtype=jnp.bfloat16)
    with pytest.raises(UserError, match=r"model\.attention=cudnn: .*bfloat16\[1, 4, 2, 8\].*: use"):
        fused_attention.by_cudnn(q, q, q)


@pytest.fixture
def cudnn(monkeypatch):
    """Stands in for cuDNN's kernel: holds its inputs to what it takes, and computes by XLA."""
    real, given = jax.nn.dot_product_attention, []

    def kernel(q, k, v, bias, *, key_value_seq_lengths=None, implementation):
        if implementation == "xla":  # the form of that name
            return real(q, k, v, bias, implementation=implementation)
        assert implementation == "cudnn"
        assert q.shape[1] % 2 == k.shape[1] % 2 == 0  # or no gradient
        if bias is not None:
            assert bias.shape[2:] == (q.shape[1], k.shape[1])
            assert isinstance(bias, jax.core.Tracer) or jnp.isfinite(bias).all()
        given.append(bias)
        return real(
            q, k, v, bias, key_value_seq_lengths=key_value_seq_lengths, implementation="xla"
        )

    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    return given


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("queries", "keys"), [(6, 12), (7, 12), (7, 7), (6, 5)])
def test_cudnn_is_given_what_it_takes_and_the_function_stays(cudnn, queries, keys, dtype):
    q, k, v = (numbers(SAMPLES, n, HEADS, DIM, dtype=dtype) for n in (queries, keys, keys))
    weight = numbers(SAMPLES, queries, HEADS, DIM)
    for bias in biases(queries, keys):

        def loss(q, k, v, form, bias=bias):
            return (weight * form(q, k, v, bias=bias)).sum()

        found = fused_attention.by_cudnn(q, k, v, bias=bias)
        assert found.shape == q.shape
        np.testing.assert_allclose(
            np.asarray(found, np.float64), reference(q, k, v, bias), rtol=0, atol=2e-2
        )
        gradients = jax.grad(loss, argnums=(0, 1, 2))
        exact = gradients(*(x.astype(jnp.float32) for x in (q, k, v)), layers.attention)
        for one, other in zip(gradients(q, k, v, fused_attention.by_cudnn), exact, strict=True):
            np.testing.assert_allclose(one.astype(jnp.float32), other, rtol=0, atol=6e-2)
    assert len(cudnn) == 6


@pytest.mark.parametrize(("dtype", "dim"), [("float32", 8), ("bfloat16", 136), ("bfloat16", 12)])
def test_cudnn_refuses_what_it_does_not_take(dtype, dim):
    q = jnp.zeros((1, 4, 2, dim), dtype)
    with pytest.raises(UserError, match=rf"^model\.attention=cudnn: {dtype} heads of {dim}: "):
        fused_attention.by_cudnn(q, q, q)


def test_a_run_on_devices_without_cudnn_is_refused_before_it_starts():
    experiment = load_config("emoji", ["model.attention=cudnn"])
    mesh = make_mesh(experiment.mesh)
    with pytest.raises(UserError, match=r"^model\.attention=cudnn: needs NVIDIA GPUs.*cpu"):
        make_step(experiment, ImageTextTask(experiment, mesh), mesh)


LENGTH, WIDTH = 5, 32  # an odd length


@pytest.mark.parametrize("unroll", [1, 2])
@pytest.mark.parametrize("split", [multiway.ALL_A, 3])
@pytest.mark.parametrize("seen", ["all", "padded", "causal"])
def test_an_encoder_with_cudnn_fills_up_an_odd_length_once_and_unseen(
    cudnn, monkeypatch, seen, split, unroll
):
    lengths, form = set(), fused_attention.by_cudnn

    def noted(q, k, v, **how):
        lengths.add((q.shape[1], k.shape[1]))
        return form(q, k, v, **how)

    monkeypatch.setitem(ATTENTION, "cudnn", noted)
    mask = jnp.asarray([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]) if seen == "padded" else None
    blocked = 1 - jnp.tril(jnp.ones((1, LENGTH, LENGTH))) if seen == "causal" else None
    tokens, weight = numbers(2, LENGTH, WIDTH, dtype=jnp.bfloat16), numbers(2, LENGTH, WIDTH)

    def outcome(attention):
        cfg = config.Model(width=WIDTH, heads=2, attention=attention, unroll=unroll)
        encoder = multiway.Encoder(nnx.Rngs(0), config.resolve(cfg), 2)
        graph, state = nnx.split(encoder)

        def loss(state, tokens):
            encoder = nnx.merge(graph, state)
            found = encoder(tokens, split=split, token_mask=mask, blocked=blocked, capture=True)
            assert found.layers is not None
            return (weight * found.tokens).sum() + (weight * found.layers[0]).sum(), found

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(state, tokens)

    found, wanted = outcome("cudnn"), outcome("xla")
    assert cudnn
    assert lengths == {(LENGTH + 1, LENGTH + 1)}  # so that no layer copies
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert one.shape == other.shape
        one, other = (np.asarray(x, np.float32) for x in (one, other))
        np.testing.assert_allclose(one, other, rtol=0, atol=5e-3 * np.abs(other).max())


def test_cudnns_forward_kernel_runs_once_where_its_results_are_kept(monkeypatch):
    """Traced, not run: jax's own primitives, as a GPU would be given them."""
    monkeypatch.setattr(kernels, "check_cudnn_version", lambda: 91_000)
    monkeypatch.setattr(kernels, "check_compute_capability", lambda *_: True)
    q = numbers(1, 4, 2, 8, dtype=jnp.bfloat16)

    def runs(policy):
        def layer(q):
            return jnp.sin(fused_attention.by_cudnn(jnp.sin(q), q, q).sum())

        traced = jax.make_jaxpr(jax.grad(layers.rematerialise(layer, policy)))(q)
        return str(traced).count("dot_product_attention_fwd")

    once = runs("none")
    assert once >= 1
    for policy in layers.KEPT:
        assert runs(policy) == once
    assert runs("full") > once
