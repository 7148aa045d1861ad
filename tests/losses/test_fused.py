# SPDX-License-Identifier: Apache-2.0
"""The Pallas form of a tile is the XLA form; here by Pallas's interpreter, as there is no GPU."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from m2jax import load_config
from m2jax.config import UserError
from m2jax.losses import fused
from m2jax.losses.contrastive import contrastive_loss
from m2jax.losses.layout import make_layout
from m2jax.losses.ring import Pairs, pair_sums
from m2jax.losses.tiles import PADDING, SIGMOID, SOFTMAX, XLA, Rows, Sums
from m2jax.train import flops
from m2jax.train import step as step_lib
from m2jax.train.image_text import ImageTextTask
from m2jax.train.main import batch_shapes
from m2jax.train.step import make_step
from tests.losses.reductions import assert_equal, dense, errors, features, mesh_of, reduce

AFFINE = 20.0, -1.5  # scale and bias of the logits
SMALL = fused.Blocks(32, 16, 32, warps=4, stages=2)  # several of them in a few rows


def side(rng, rows, dim, wire, form, padded):
    """Unit rows, ids with many equal ones, and a state as the backward pass has it."""
    x = rng.normal(size=(rows, dim))
    ids = rng.integers(0, max(rows // 2, 1), rows)
    if padded:
        ids[-(rows // 3) :] = PADDING
    change, top = rng.normal(size=(2, rows)).astype(np.float32)
    state = Sums(jnp.asarray(top), jnp.asarray(change)) if form is SOFTMAX else jnp.asarray(change)
    x = jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), wire)
    return Rows(x, jnp.asarray(ids, jnp.int32), state)


def both(kernel, form, rows, columns, padded):
    """Sums, weights and what these add up to, as one compiled program."""

    def run(rows, columns):
        scale, bias = jnp.asarray(AFFINE, jnp.promote_types(rows.features.dtype, "float32"))
        sums = kernel.sums(form, rows, columns, scale, bias, padded=padded)
        return sums, kernel.weights(form, rows, columns, scale, bias, padded=padded)

    return jax.tree.map(np.asarray, jax.jit(run)(rows, columns))


@pytest.mark.parametrize(
    ("form", "wire"),
    [(SOFTMAX, "float32"), (SOFTMAX, "bfloat16"), (SIGMOID, "bfloat16")],
    ids=["softmax", "softmax in bfloat16", "sigmoid in bfloat16"],
)
def test_a_tile_of_any_shape(form, wire, monkeypatch):
    monkeypatch.setattr(fused, "BLOCKS", {2: SMALL, 4: SMALL})

    @given(
        m=st.integers(1, 70),
        n=st.integers(1, 70),
        dim=st.sampled_from([1, 16, 72]),
        padded=st.booleans(),
        seed=st.integers(0, 2**16),
    )
    @example(m=70, n=40, dim=72, padded=True, seed=0)
    @settings(max_examples=2, deadline=None)
    def check(m, n, dim, padded, seed):
        rng = np.random.default_rng(seed)
        sides = [side(rng, k, dim, wire, form, padded) for k in (m, n)]
        sums, (weights, added) = both(fused.make_kernel("interpret"), form, *sides, padded)
        assert weights.dtype == wire
        with jax.enable_x64(True):
            wide = jax.tree.map(lambda x: x if x.dtype == "int32" else x.astype("float64"), sides)
            true, (true_weights, true_added) = both(XLA, form, *wide, padded)
        jax.tree.map(lambda a, b: close(a, b, 1e-5), sums, true)
        close(added, true_added, 1e-4)
        close(weights, true_weights, 1e-4 if wire == "float32" else 2**-8)

    check()


def close(found, expected, most):
    assert found.shape == expected.shape
    scale = max(1.0, np.abs(expected[np.isfinite(expected)]).max(initial=0.0))
    np.testing.assert_allclose(
        np.asarray(found, np.float64), expected, rtol=most, atol=most * scale
    )


# (mesh, rows in all, most rows of a tile, impl, features, wire): as on a card, with blocks of
# 128 x 256 logits in bfloat16 and of 64 x 64 in float32, which rows and features do not fill
CASES = [
    (1, 300, 2048, "chunked", 72, "float32"),
    (1, 300, 2048, "chunked", 72, "bfloat16"),
    (1, 200, 150, "ring", 72, "bfloat16"),
    (4, 88, 30, "ring", 16, "float32"),
    (8, 104, 7, "grid", 24, "bfloat16"),
    (8, 88, 7, "chunked", 16, "float32"),
]


@pytest.mark.parametrize(("mesh", "n", "tile", "impl", "dim", "wire"), CASES)
def test_the_loss_and_its_gradients(mesh, n, tile, impl, dim, wire):
    image, text = features(n, n, "close", "float32", dim)
    ids = np.random.default_rng(n).integers(0, n // 2, n).astype(np.int32)
    options = {"impl": impl, "tile": tile, "wire_dtype": wire}
    found = reduce(mesh, image, text, 30.0, ids=ids, kernel="interpret", **options)
    near, near_text = (np.asarray(jnp.asarray(x, wire), np.float32) for x in (image, text))
    with jax.enable_x64(True):
        of_value, of_grads = errors(found, dense(near, near_text, 30.0, ids=ids), 30.0)
    assert of_value < 1e-6
    if wire == "float32":
        assert of_grads < 1e-5
    else:  # weights are rounded to 8 bits, but alike
        assert of_grads < 2**-9
        by_xla = errors(found, reduce(mesh, image, text, 30.0, ids=ids, **options), 30.0)
        assert max(by_xla) < 1e-5


def test_the_sigmoid_loss_and_that_of_its_bias():
    image, text = features(2, 120, "close", "float32")
    ids = np.random.default_rng(1).integers(0, 60, 120).astype(np.int32)
    options = {"impl": "chunked", "tile": 18, "sigmoid": True}
    found = reduce(2, image, text, 20.0, -4.0, ids, kernel="interpret", **options)
    with jax.enable_x64(True):
        assert_equal(found, dense(image, text, 20.0, -4.0, ids, sigmoid=True), 20.0, "float32")


def test_rows_without_a_negative_and_logits_past_the_range_of_exp():
    options = {"impl": "chunked", "tile": 64, "kernel": "interpret"}
    image, text = (300 * x for x in features(6, 100, dtype="float32"))  # logits of millions
    value, grads = reduce(1, image, text, 100.0, ids=np.zeros(100, np.int32), **options)
    assert value == 0
    assert all(not np.asarray(grad).any() for grad in grads)
    found = reduce(1, image, text, 100.0, ids=np.arange(100, dtype=np.int32), **options)
    with jax.enable_x64(True):
        value, grads = errors(found, dense(image, text, 100.0), 100.0)
    assert max(value, grads) < 1e-5


def lowered_for_a_gpu(mesh, form, wire, function=jax.value_and_grad):
    """The text of a program of several tiles, as Pallas makes it for an NVIDIA GPU."""
    if jax.__version_info__ >= (0, 11):
        pytest.skip("this jax makes no Triton program without a GPU")
    pairs = Pairs(make_layout(mesh, "ring"), form, 64, jnp.dtype(wire), fused.make_kernel("pallas"))

    def total(image, text, ids, scale, bias):
        return sum(
            x.sum() for x in jax.tree.leaves(pair_sums(pairs, image, text, ids, scale, bias))
        )

    rows = jax.ShapeDtypeStruct((1024, 72), jnp.float32)
    ids, number = jax.ShapeDtypeStruct((1024,), jnp.int32), jax.ShapeDtypeStruct((), jnp.float32)
    traced = jax.jit(function(total)).trace(rows, rows, ids, number, number)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("form", [SOFTMAX, SIGMOID], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("wire", ["float32", "bfloat16"])
def test_both_kernels_become_programs_of_triton_on_every_device_of_a_mesh(form, wire):
    text = lowered_for_a_gpu(mesh_of(2), form, wire)
    for name in "contrastive_sums", "contrastive_weights":
        assert text.count(f'name = "{name}"') == 2  # with one's own rows, and with the other's
    assert text.count("__gpu$xla.gpu.triton") == 4


def test_a_utilisation_counts_its_products_as_those_of_xla():
    image = jnp.zeros((512, 64))

    def work(kernel):
        loss = functools.partial(
            contrastive_loss, scale=1.0, impl="chunked", tile=128, kernel=kernel
        )
        return flops.traced(jax.make_jaxpr(jax.grad(loss))(image, image))

    assert work("interpret") == work("xla") == 4 * 2 * 512**2 * 64


def test_logits_are_never_in_memory_and_weights_are_in_the_type_of_the_wire():
    """A tile is 64 rows by 256 columns."""
    forward = lowered_for_a_gpu(None, SOFTMAX, "bfloat16", lambda function: function)
    both = lowered_for_a_gpu(None, SOFTMAX, "bfloat16")
    assert "tensor<64x256x" not in forward
    assert "tensor<64x256xbf16>" in both
    assert "tensor<64x256xf32>" not in both


def test_products_of_float32_are_whole_ones():
    """Triton's default is TF32, which the interpreter does not have."""
    kernel = fused.make_kernel("pallas")
    rows = side(np.random.default_rng(0), 8, 8, "float32", SOFTMAX, False)
    number = jnp.float32(1)
    for operation in kernel.sums, kernel.weights:
        made = jax.make_jaxpr(
            lambda a, b, run=operation: run(SOFTMAX, a, b, number, number, padded=False)
        )(rows, rows)
        assert "Precision.HIGHEST" in str(made)


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"kernel": "pallas"}, UserError, "kernel=pallas: needs NVIDIA GPUs, and this run has cpu"),
        ({"kernel": "interpret", "impl": "dense"}, UserError, "impl=dense, which has no tiles"),
        ({"kernel": "interpret", "impl": "local"}, UserError, "impl=local, which has no tiles"),
        ({"kernel": "cuda"}, ValueError, "kernel='cuda' is unknown: use xla or pallas"),
    ],
)
@pytest.mark.parametrize("mesh", [None, 8])
def test_what_it_cannot_do_is_refused(kwargs, error, match, mesh):
    image, text = map(jnp.asarray, features(0, 16, dtype="float32"))
    with pytest.raises(error, match=match):
        contrastive_loss(
            image, text, 1.0, **{"impl": "ring", "mesh": mesh and mesh_of(mesh), **kwargs}
        )


@pytest.mark.parametrize(
    ("dtype", "wire"), [("float64", ""), ("float64", "float32"), ("float32", "float8_e5m2")]
)
def test_other_precisions_are_refused(dtype, wire):
    with jax.enable_x64(True):
        image, text = map(jnp.asarray, features(0, 16, dtype=dtype))
        with pytest.raises(UserError, match="kernel=interpret adds up in float32 what it multi"):
            contrastive_loss(image, text, 1.0, impl="chunked", kernel="interpret", wire_dtype=wire)


def test_a_run_without_gpus_or_without_tiles_does_not_start():
    parts = ["loss.contrastive.kernel=pallas", "loss.contrastive.impl=chunked"]
    experiment = load_config("emoji", parts)
    mesh = mesh_of(8)
    with pytest.raises(UserError, match=r"kernel=pallas: needs NVIDIA GPUs, and this run has cpu"):
        make_step(experiment, ImageTextTask(experiment, mesh), mesh)
    with pytest.raises(UserError, match=r"kernel=pallas: .*impl=dense has no tiles"):
        ImageTextTask(load_config("emoji", parts[:1]), mesh)


def test_the_kernel_of_a_config_reaches_the_loss(monkeypatch):
    monkeypatch.setattr(step_lib, "fused", SimpleNamespace(check=lambda *_: None))
    parts = ["loss.contrastive.kernel=pallas", "loss.contrastive.impl=chunked"]
    experiment, mesh = load_config("emoji", parts), mesh_of(8)
    task = ImageTextTask(experiment, mesh)
    step = make_step(experiment, task, mesh)
    with pytest.raises(UserError, match="kernel=pallas: needs NVIDIA GPUs"):
        step.run.trace(step.abstract_state, batch_shapes(task, experiment, mesh))
