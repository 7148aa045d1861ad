# SPDX-License-Identifier: Apache-2.0
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2jax.checkpoint.convert.m2_names import slots
from m2jax.config import Mesh, Model, UserError, resolve
from m2jax.dist.mesh import make_mesh
from m2jax.dist.sharding import AxisRules
from m2jax.models import layers, m2
from m2jax.models import params as params_lib

TINY = resolve(
    Model(
        width=16,
        heads=2,
        out_dim=8,
        vocab_size=32,
        text_positions=16,
        image_size=16,
        dtype="float32",
        init="scaled",
    )
)
PUBLISHED = {"0.4b": 263_289_602, "1b": 730_416_130, "10b": 10_182_004_738}


def model_of(cfg, seed=0):
    abstract = params_lib.abstract(cfg)
    return abstract, jax.jit(lambda: params_lib.initialise(cfg, jax.random.key(seed)))()


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes_have_the_published_number_of_parameters(size):
    cfg = resolve(Model(name=f"m2-encoder-{size}"))
    padding = (m2.padded_vocab(cfg.vocab_size) - cfg.vocab_size) * cfg.width
    abstract = params_lib.abstract(cfg)
    assert params_lib.count(abstract.params) - padding == PUBLISHED[size]
    places = {(s.name, s.layer) for s in slots(cfg).values()}
    assert len(places) == len(slots(cfg))
    assert {name for name, _ in places} == set(abstract.axes)


def test_grid_positions_know_rows_from_columns():
    table = m2.grid_positions(jax.random.key(0), (2 + 1 + 16, 32), jnp.dtype("float32"))
    assert np.square(table[2]).mean() > 1e-3  # of [CLS], which must not be zero in a layer norm
    grid = np.asarray(table[3:]).reshape(4, 4, 32)
    near = grid @ grid[1, 2]  # falls with the distance along each axis, by symmetry alike
    np.testing.assert_allclose(near[1, [1, 3]], near[[0, 2], 2], rtol=1e-6)
    assert near[1, 2] > near[1, 1] > near[1, 0]
    assert near[1, 2] > near[2, 2] > near[3, 2]
    assert len(np.unique(np.round(grid.reshape(16, 32), 5), axis=0)) == 16
    np.testing.assert_allclose(np.square(grid).sum(-1), 32 / 8, rtol=1e-6)  # 0.5^2 a pair


@pytest.mark.parametrize(
    "change", [{"remat": "full"}, {"remat": "dots"}, {"unroll": 2}, {"unroll": 99}]
)
def test_remat_and_unrolling_change_no_gradient(change):
    abstract, params = model_of(TINY)
    other = params_lib.abstract(dataclasses.replace(TINY, **change))
    x = jax.random.uniform(jax.random.key(1), (3, 16, 16, 3))

    def gradient(graph):
        def loss(p):
            return jnp.square(params_lib.bind(graph, p).encode_image(x).features[:, 0]).sum()

        return jax.jit(jax.grad(loss))(params)

    for a, b in zip(
        jax.tree.leaves(gradient(abstract.graph)),
        jax.tree.leaves(gradient(other.graph)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_what_lies_behind_the_mask_changes_nothing():
    abstract, params = model_of(TINY)
    model = params_lib.bind(abstract.graph, params)
    ids = jnp.array([[2, 5, 6, 3, 0, 0]])
    mask = jnp.array([[1, 1, 1, 1, 0, 0]])
    other = ids.at[0, 4:].set(jnp.array([9, 17]))
    np.testing.assert_array_equal(
        model.encode_text(ids, mask).features, model.encode_text(other, mask).features
    )
    changed = model.encode_text(ids.at[0, 2].set(9), mask).features
    assert not np.allclose(changed, model.encode_text(ids, mask).features)


def test_dropping_patches_keeps_the_first_token_and_the_stated_count():
    tokens = jax.random.normal(jax.random.key(0), (4, 17, 3))
    kept = m2.drop_patches(tokens, 0.5, jax.random.key(1))
    assert kept.shape == (4, 1 + 8, 3)
    np.testing.assert_array_equal(kept[:, 0], tokens[:, 0])
    for row, source in zip(np.asarray(kept), np.asarray(tokens), strict=True):
        assert len({tuple(t) for t in row} & {tuple(t) for t in source}) == 9


def test_drop_path_keeps_the_mean_and_whole_samples():
    x = jnp.ones((4000, 2))
    y = np.asarray(layers.drop_path(x, 0.25, jax.random.key(0)))
    assert set(np.unique(y)) == {0.0, np.float32(4 / 3)}
    assert (y[:, 0] == y[:, 1]).all()
    assert abs(y.mean() - 1) < 0.03


def test_drop_path_is_off_without_a_key():
    abstract, params = model_of(dataclasses.replace(TINY, drop_path=0.9))
    model = params_lib.bind(abstract.graph, params)
    x = jnp.ones((1, 16, 16, 3))
    np.testing.assert_array_equal(model.encode_image(x).features, model.encode_image(x).features)
    dropped = model.encode_image(x, rng=jax.random.key(3)).features
    assert not np.allclose(dropped, model.encode_image(x).features)


def test_drop_path_reaches_both_parts_of_the_joint_mode_and_is_off_without_a_key():
    abstract, params = model_of(dataclasses.replace(TINY, drop_path=0.9, vl_layers=2))
    model = params_lib.bind(abstract.graph, params)
    image = model.embed_image(jax.random.uniform(jax.random.key(1), (1, 16, 16, 3)))
    text, mask = model.embed_text(jnp.array([[2, 5, 6, 3]])), jnp.ones((1, 4), jnp.int32)
    drawn = jax.random.key(5)
    both, rngs = jnp.concatenate([image, text], 1), jax.random.split(drawn)
    found = model.backbone(both, split=image.shape[1], rng=rngs[0]).tokens
    found = model.vl(found, split=image.shape[1], rng=rngs[1]).tokens
    dropped = model.encode_joint(image, text, mask, rng=drawn)
    np.testing.assert_allclose(jnp.concatenate(dropped, 1), found, atol=1e-5)
    kept = jnp.concatenate(model.encode_joint(image, text, mask), 1)
    plain = model.backbone(both, split=image.shape[1]).tokens
    np.testing.assert_allclose(kept, model.vl(plain, split=image.shape[1]).tokens, atol=1e-5)
    assert not np.allclose(kept, found, atol=1e-2)


def test_bfloat16_activations_stay_near_float32():
    abstract, params = model_of(TINY)
    half = params_lib.abstract(dataclasses.replace(TINY, dtype="bfloat16"))
    x = jax.random.uniform(jax.random.key(1), (3, 16, 16, 3))
    a = params_lib.bind(abstract.graph, params).encode_image(x)
    b = params_lib.bind(half.graph, params).encode_image(x)
    assert b.vl.tokens.dtype == jnp.bfloat16
    assert b.features.dtype == jnp.float32
    assert (a.features * b.features).sum(-1).min() > 0.99


def test_sharding_refuses_what_does_not_divide():
    mesh = make_mesh(Mesh(data=1, fsdp=8))
    odd = params_lib.abstract(dataclasses.replace(TINY, width=12, heads=2))
    with pytest.raises(UserError, match="does not divide over 8"):
        params_lib.shardings(odd, mesh, AxisRules())


def test_one_mesh_axis_is_never_used_twice():
    with pytest.raises(UserError, match="used twice"):
        AxisRules(mlp="fsdp").spec(("embed", "mlp"))
