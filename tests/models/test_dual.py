# SPDX-License-Identifier: Apache-2.0
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2jax.config import Mesh, UserError
from m2jax.config_dual import FAMILIES, Dual, Text, Vision, check, from_json, to_json
from m2jax.dist.mesh import make_mesh
from m2jax.dist.sharding import AxisRules, use_rules
from m2jax.models import params as params_lib
from tests.models.dual_toys import TOYS, inputs, random_params


def model_of(cfg):
    return params_lib.bind(params_lib.abstract(cfg).graph, random_params(cfg))


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_unit_rows_of_the_stated_width(family):
    cfg = TOYS[family]
    pixels, ids, mask = inputs(cfg)
    model = model_of(cfg)
    for features in (model.encode_image(pixels).features, model.encode_text(ids, mask).features):
        assert features.shape == (4, cfg.out_dim)
        assert features.dtype == jnp.float32
        np.testing.assert_allclose(np.linalg.norm(features, axis=-1), 1, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sharded_model_gives_the_same_features(family):
    cfg = TOYS[family]
    abstract, params = params_lib.abstract(cfg), random_params(cfg)
    pixels, ids, mask = inputs(cfg)
    mesh, rules = make_mesh(Mesh(data=1, fsdp=4, model=2)), AxisRules()
    places = params_lib.shardings(abstract, mesh, rules)
    spread = jax.device_put(params, places)
    assert spread["vision"]["stack"]["blocks"]["fc1"]["kernel"].addressable_shards[
        0
    ].data.shape == (3, 8, 24)
    assert spread["text"]["embed"].addressable_shards[0].data.shape == (1024, 8)

    def features(p):
        with use_rules(mesh, rules):
            model = params_lib.bind(abstract.graph, p)
            return model.encode_image(pixels).features, model.encode_text(ids, mask).features

    plain = params_lib.bind(abstract.graph, params)
    image, text = jax.jit(features)(spread)
    np.testing.assert_allclose(image, plain.encode_image(pixels).features, atol=2e-6)
    np.testing.assert_allclose(text, plain.encode_text(ids, mask).features, atol=2e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_moves_a_feature_or_a_logit(family):
    cfg = TOYS[family]
    abstract, params = params_lib.abstract(cfg), random_params(cfg)
    pixels, ids, mask = inputs(cfg)

    def loss(p):
        model = params_lib.bind(abstract.graph, p)
        image = model.encode_image(pixels).features
        text = model.encode_text(ids, mask).features
        logits = jnp.exp(p["logit_scale"]) * (image @ text.T) + p.get("logit_bias", 0.0)
        return jnp.sin(logits).sum() + jnp.sin(3 * image).sum() + jnp.sin(3 * text).sum()

    for name, gradient in params_lib.flatten(jax.jit(jax.grad(loss))(params)).items():
        if name.endswith("k.bias"):  # it adds the same to a query's scores: the softmax drops it
            assert np.abs(gradient).max() < 1e-4
            continue
        layers = gradient if ".blocks." in name else [gradient]
        for layer in layers:
            assert np.abs(layer).max() > 1e-6, name


@pytest.mark.parametrize("change", [{"remat": "full"}, {"remat": "dots"}, {"unroll": 99}])
def test_remat_and_unrolling_change_no_gradient(change):
    cfg = TOYS["clip"]
    params = random_params(cfg)
    pixels = inputs(cfg)[0]

    def gradient(cfg):
        graph = params_lib.abstract(cfg).graph

        def loss(p):
            return params_lib.bind(graph, p).encode_image(pixels).features[:, 0].sum()

        return jax.tree.leaves(jax.jit(jax.grad(loss))(params))

    for a, b in zip(gradient(cfg), gradient(dataclasses.replace(cfg, **change)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_what_a_text_tower_sees():
    """CLIP: what comes before its end. Chinese-CLIP: what the mask keeps. SigLIP: everything."""
    for family, seen in (
        ("clip", [True, False, False]),
        ("chinese-clip", [True, True, False]),
        ("siglip", [True, True, True]),
    ):
        cfg = TOYS[family]
        model, ids = model_of(cfg), np.array([[7, 9, 11, 58, 12, 13, 14, 15, 16, 17]], np.int32)
        mask = np.arange(10)[None] < 6
        first = model.encode_text(ids, mask).features
        for place, expected in zip((1, 5, 8), seen, strict=True):
            other = ids.copy()
            other[0, place] = 20
            moved = np.abs(model.encode_text(other, mask).features - first).max() > 1e-4
            assert moved == expected, (family, place)


def test_eos_pooling_takes_the_first_end():
    cfg = TOYS["clip"]
    text = dataclasses.replace(cfg.text, pooling="eos", eos_id=5)
    params = random_params(cfg)
    ids = np.array([[7, 9, 5, 58, 5, 13, 14, 15, 16, 17]], np.int32)
    mask = np.ones_like(ids)
    model = params_lib.bind(params_lib.abstract(dataclasses.replace(cfg, text=text)).graph, params)
    short = ids[:, :3].copy()
    short[0, 2] = 59  # the largest id: where argmax pooling looks
    argmax = params_lib.bind(params_lib.abstract(cfg).graph, params)
    long_argmax = argmax.encode_text(ids, mask).features
    np.testing.assert_allclose(
        model.encode_text(ids[:, :3], mask[:, :3]).features,
        model.encode_text(ids, mask).features,
        atol=1e-6,
    )
    assert np.abs(model.encode_text(ids, mask).features - long_argmax).max() > 1e-3


def test_a_row_without_any_token_gives_numbers():
    cfg = TOYS["chinese-clip"]
    features = model_of(cfg).encode_text(np.zeros((2, 10), np.int32), np.zeros((2, 10))).features
    assert np.isfinite(features).all()


def test_bfloat16_activations_stay_near_float32():
    for cfg in TOYS.values():
        pixels, ids, mask = inputs(cfg)
        params = random_params(cfg)
        half = params_lib.abstract(dataclasses.replace(cfg, dtype="bfloat16"))
        low, high = params_lib.bind(half.graph, params), model_of(cfg)
        for a, b in (
            (low.encode_image(pixels), high.encode_image(pixels)),
            (low.encode_text(ids, mask), high.encode_text(ids, mask)),
        ):
            assert a.tokens.dtype == jnp.bfloat16
            assert a.features.dtype == jnp.float32
            assert (a.features * b.features).sum(-1).min() > 0.98


def test_wrong_sizes_are_refused_with_the_right_ones():
    model = model_of(TOYS["clip"])
    with pytest.raises(UserError, match=r"takes \[batch, 22, 22, 3\]"):
        model.encode_image(np.zeros((1, 24, 24, 3), np.float32))
    with pytest.raises(UserError, match="at most 10 tokens"):
        model.encode_text(np.zeros((1, 11), np.int32), np.ones((1, 11)))


@pytest.mark.parametrize("family", FAMILIES)
def test_config_json_round_trip(family):
    assert from_json(to_json(TOYS[family])) == TOYS[family]
    assert hash(TOYS[family])


@pytest.mark.parametrize(
    ("cfg", "words"),
    [
        (Dual(family="blip"), "family='blip'"),
        (Dual(vision=Vision(activation="relu")), "quick_gelu"),
        (Dual(vision=Vision(heads=7)), "vision.heads"),
        (Dual(text=Text(layers=0)), "text.layers=0"),
        (Dual(text=Text(layers=10**9)), "between 1 and 512"),
        (Dual(text=Text(vocab_size=10**12)), "text.vocab_size"),
        (Dual(text=Text(pooling="mean")), "argmax"),
        (Dual(vision=Vision(image_size=16)), "smaller than vision.patch_size"),
        (Dual(vision=Vision(std=(1.0, 0.0, 1.0))), "vision.std.*above 0"),
        (Dual(vision=Vision(projection=False)), "without a projection"),
        (Dual(dtype="float8"), "dtype"),
    ],
)
def test_configs_that_do_not_fit_are_refused_in_one_line(cfg, words):
    with pytest.raises(UserError, match=words) as caught:
        check(cfg, "here")
    assert str(caught.value).startswith("here: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[1]", '{"vision": {"widht": 3}}', '{"vision": 3}'])
def test_damaged_json_is_refused(text):
    with pytest.raises(UserError, match=r"config\.json"):
        from_json(text)
