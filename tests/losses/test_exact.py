# SPDX-License-Identifier: Apache-2.0
"""Every exact form of the contrastive loss is the dense one, in value and in each gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2jax.losses.layout import IMPLS, make_layout
from tests.losses.reductions import (
    MESHES,
    assert_equal,
    compiled,
    dense,
    errors,
    features,
    mesh_of,
    reduce,
)

# (mesh, rows in all, most rows of a tile, impl): tiles that do not divide, rings of 2 to 8 stops
CASES = [
    (1, 7, 2048, "ring"),
    (1, 7, 3, "chunked"),
    (1, 1, 2048, "ring"),
    (2, 6, 2048, "ring"),
    (2, 10, 2, "hierarchical"),
    (2, 2, 2048, "local"),
    (4, 20, 2, "ring"),
    (4, 16, 2048, "grid"),
    (4, 24, 2048, "local"),
    (8, 8, 2048, "ring"),
    (8, 40, 2, "ring"),
    (8, 24, 2, "grid"),
    (8, 48, 4, "hierarchical"),
    (8, 24, 7, "chunked"),
    (8, 32, 2048, "local"),
    ("ring of 8", 40, 3, "ring"),
    ("ring of 8", 32, 2, "grid"),
    ("copies", 12, 2, "grid"),
]
SINGLE = [CASES[i] for i in (4, 7, 10, 11, 12, 13, 14)]  # in float32 too
EXAMPLES = settings(max_examples=12, deadline=None)


def draws():
    return given(
        seed=st.integers(0, 2**20),
        scale=st.sampled_from([0.01, 1.0, 14.3, 100.0]) | st.floats(0.01, 100),
        kind=st.sampled_from(["random", "aligned", "close"]),
    )


@pytest.mark.parametrize(("mesh", "n", "tile", "impl"), CASES)
def test_float64(mesh, n, tile, impl):
    @draws()
    @EXAMPLES
    def check(seed, scale, kind):
        with jax.enable_x64(True):
            image, text = features(seed, n, kind)
            found = reduce(mesh, image, text, scale, impl=impl, tile=tile)
            assert_equal(found, dense(image, text, scale), scale, "float64")

    check()


@pytest.mark.parametrize(("mesh", "n", "tile", "impl"), SINGLE)
def test_float32(mesh, n, tile, impl):
    @given(
        seed=st.integers(0, 2**20),
        scale=st.sampled_from([1.0, 14.3, 100.0]) | st.floats(0.01, 100),
        kind=st.sampled_from(["random", "aligned"]),
    )
    @EXAMPLES
    def check(seed, scale, kind):
        image, text = features(seed, n, kind, "float32")
        scale = float(np.float32(scale))
        found = reduce(mesh, image, text, scale, impl=impl, tile=tile)
        with jax.enable_x64(True):
            assert_equal(found, dense(image, text, scale), scale, "float32")

    check()


@pytest.mark.parametrize("impl", ["local", "ring", "grid"])
@pytest.mark.parametrize("option", ["ids", "sigmoid", "sigmoid ids", "smoothing"])
def test_options(impl, option):
    with jax.enable_x64(True):
        image, text = features(3, 40, "close")
        ids = np.random.default_rng(0).integers(-3, 9, 40).astype(np.int32)
        ids = ids if "ids" in option else None
        options = {"sigmoid": "sigmoid" in option, "label_smoothing": 0.1 * (option == "smoothing")}
        found = reduce(8, image, text, 20.0, -4.0, ids, impl=impl, tile=2, **options)
        assert_equal(found, dense(image, text, 20.0, -4.0, ids, **options), 20.0, "float64")


def test_a_batch_of_one_caption_has_no_negatives_and_no_gradient():
    image, text = features(5, 8, dtype="float32")
    value, grads = reduce(4, image, text, 100.0, ids=np.zeros(8, np.int32), impl="ring")
    assert value == 0
    assert all(not np.asarray(grad).any() for grad in grads)


def test_logits_past_the_range_of_exp_do_not_overflow():
    image, text = (300 * x for x in features(6, 16, dtype="float32"))  # logits of millions
    found = reduce(8, image, text, 100.0, impl="ring", tile=1)
    with jax.enable_x64(True):
        value, grads = errors(found, dense(image, text, 100.0), 100.0)
    assert max(value, grads) < 1e-5


@pytest.mark.parametrize("impl", ["ring", "grid", "local", "dense"])
def test_bfloat16_on_the_wire_is_the_loss_of_rounded_features(impl):
    image, text = features(7, 64, "close", "float32")
    near, near_text = (np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in (image, text))
    found = reduce(8, image, text, 30.0, impl=impl, tile=4, wire_dtype="bfloat16")
    with jax.enable_x64(True):
        of_value, of_grads = errors(found, dense(near, near_text, 30.0), 30.0)
    assert of_value < 1e-6
    # Weights of logits are rounded for the products too, to 8 bits: half a unit is 2 ** -9.
    assert of_grads < (1e-5 if impl == "dense" else 2**-9)
    assert found[1][0].dtype == jnp.float32


def test_memory_of_logits_does_not_grow_with_the_batch():
    """Temporaries of ``ring`` grow with the features alone; those of ``local`` with the square."""

    def temporaries(impl, n):
        image, text = (jnp.zeros((n, 16)) for _ in range(2))
        function, _ = compiled("ring of 8", (("impl", impl), ("tile", 64)))
        lowered = function.lower(image, text, jnp.float32(1), jnp.float32(0), None)
        memory = lowered.compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    small, large = temporaries("ring", 1024), temporaries("ring", 4096)
    features_per_device = (4096 - 1024) // 8 * 16 * 4
    assert large - small < 12 * features_per_device
    assert temporaries("local", 4096) > 4 * large


@pytest.mark.slow
@given(
    mesh=st.sampled_from(list(MESHES)),
    impl=st.sampled_from(("dense", *IMPLS)),
    rows=st.integers(1, 9),
    tile=st.integers(1, 12),
    option=st.sampled_from(["", "ids", "sigmoid", "sigmoid ids", "smoothing"]),
    kind=st.sampled_from(["random", "aligned", "close"]),
    scale=st.sampled_from([1.0, 14.3, 100.0]) | st.floats(0.01, 100),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=60, deadline=None)
def test_any_batch_over_any_mesh_in_any_tiles(mesh, impl, rows, tile, option, kind, scale, seed):
    with jax.enable_x64(True):
        layout = make_layout(mesh_of(mesh), "ring")
        n = rows * layout.size(layout.rows)
        image, text = features(seed, n, kind)
        ids = np.random.default_rng(seed).integers(-3, n, n) if "ids" in option else None
        options = {"sigmoid": "sigmoid" in option, "label_smoothing": 0.1 * (option == "smoothing")}
        found = reduce(mesh, image, text, scale, -2.0, ids, impl=impl, tile=tile, **options)
        expected = dense(image, text, scale, -2.0, ids, **options)
        assert_equal(found, expected, scale, "float64")


@pytest.mark.parametrize("impl", ["ring", "local"])
@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.uint32, np.int64])
def test_ids_of_any_type_mean_what_they_say(impl, kind):
    """Clamped before they were widened, unsigned ids all became one caption; wide ones were cut."""
    ids = np.random.default_rng(0).integers(0, 9, 16).astype(kind) + kind(np.iinfo(kind).max - 8)
    ids[::5] = ids[0] if kind != np.int64 else ids[0] - 2**33  # alike in their lowest 32 bits
    with jax.enable_x64(True):
        image, text = features(3, 16)
        found = reduce(8, image, text, 20.0, ids=ids, impl=impl, tile=2)
        assert_equal(found, dense(image, text, 20.0, ids=ids), 20.0, "float64")
