# SPDX-License-Identifier: Apache-2.0
"""The published model's own numbers; cases are found by what the files hold."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import m2jax
from m2jax.checkpoint.convert import m2_arch
from m2jax.checkpoint.convert.m2_names import slots
from m2jax.checkpoint.convert.m2_reference import Reference, Sizes
from m2jax.models import layers, multiway
from m2jax.models import params as params_lib
from m2jax.models.multiway import ALL_A, ALL_B
from tests.golden import fixtures

FEATURES, HIDDEN, LOGITS, DOUBLE = 2e-6, 2e-5, 3e-5, 1e-9


def is_model(file):
    """Inputs and outputs of a model, whose weights and config lie beside it."""
    return "in_image" in fixtures.keys(file)


def is_double(file):
    """Outputs in float64 for the inputs of another file."""
    keys = fixtures.keys(file)
    return "image_cls_vlffn_feats" in keys and "in_image" not in keys


def single(file):
    return file.with_name(file.name.replace("_f64", ""))


CASES = fixtures.cases("m2", "tiny model", is_model)
# A planted mistake shows by how much the weights let it: these fixtures' weights, not any others'.
OUR_CASES = fixtures.cases("m2", "tiny model", is_model, fixtures.HERE)
DOUBLE_CASES = fixtures.cases("m2", "tiny model in float64", is_double)


def weights_of(case):
    return case.with_suffix(".safetensors")


def config_of(case):
    return m2_arch.from_official(fixtures.values(case.with_suffix(".json")), case.name).model


def build(case, dtype):
    """The model of a case, with the official tensors put where they belong."""
    cfg = dataclasses.replace(config_of(case), dtype=dtype, param_dtype=dtype)
    model = params_lib.abstract(cfg)
    arrays = {n: np.zeros(s.shape, dtype) for n, s in params_lib.flatten(model.params).items()}
    official = load_file(weights_of(case))
    places = slots(cfg)
    assert set(places) == set(official)
    for name, slot in places.items():
        tensor = slot.inward(official[name])
        where = slot.layer if slot.layer is not None else slice(slot.rows) if slot.rows else ...
        arrays[slot.name][where] = tensor
    params = jax.tree_util.tree_map_with_path(
        lambda path, _: jnp.asarray(arrays[params_lib.dotted(path)]), model.params
    )
    return params_lib.bind(model.graph, params)


def pixels_of(golden, key, dtype):
    return jnp.asarray(golden[key].transpose(0, 2, 3, 1), dtype)


def outputs(model, golden, dtype):
    """Everything a fixture may hold, by its key."""
    pixels = pixels_of(golden, "in_image", dtype)
    ids, mask = jnp.asarray(golden["in_text_ids"]), jnp.asarray(golden["in_text_masks"])
    image = model.encode_image(pixels, capture=True)
    text = model.encode_text(ids, mask, capture=True)
    cosines = image.features @ text.features.T
    logits = jnp.exp(model.logit_scale[...]) * cosines
    first = image.backbone_features @ text.backbone_features.T
    return {
        "image_cls_vlffn_feats": image.features,
        "image_cls_feats": image.backbone_features,
        "text_cls_vlffn_feats": text.features,
        "text_cls_feats": text.backbone_features,
        "image_patch_embed": model.vision_embed(pixels),
        "image_embed_with_pos": model.embed_image(pixels),
        "text_embed": model.text_embed[...][ids],
        "text_embed_with_pos": model.embed_text(ids),
        "image_layers_backbone": image.backbone.layers,
        "image_layers_vl": image.vl.layers,
        "text_layers_backbone": text.backbone.layers,
        "text_layers_vl": text.vl.layers,
        "image_backbone_out": image.backbone.tokens,
        "image_vl_out": image.vl.tokens,
        "text_backbone_out": text.backbone.tokens,
        "text_vl_out": text.vl.tokens,
        "logits_per_image": logits,
        "logits_per_image_cls_feats": jnp.exp(model.logit_scale[...]) * first,
        "logits_per_image_vlscale": jnp.exp(model.logit_vl_scale[...]) * cosines,
        "probs_per_image": jax.nn.softmax(logits, axis=-1),
        "x_text_vl_out_B": model.vl(text.backbone.tokens, split=ALL_B, token_mask=mask).tokens,
        "x_image_pooler_of_vl_out": jnp.tanh(model.pooler(image.vl.tokens[:, 0])),
        "x_image_norm_of_vl_out": model.norm(image.vl.tokens),
    } | extras(model, golden, dtype)


def extras(model, golden, dtype):
    """What a fixture holds only with inputs of its own: masked patches, odd sizes, joint tokens."""
    found = {}
    if "in_image_masked_position" in golden:
        masked = jnp.asarray(golden["in_image_masked_position"]) != 0
        tokens = model.embed_image(pixels_of(golden, "in_image", dtype), masked=masked)
        found["x_image_masked_backbone_out"] = model.backbone(tokens, split=ALL_A).tokens
    if "in_image_nonsquare" in golden:
        encoded = model.encode_image(pixels_of(golden, "in_image_nonsquare", dtype))
        found["x_image_nonsquare_cls_vlffn_feats"] = encoded.features
        found["x_image_nonsquare_backbone_out"] = encoded.backbone.tokens
    if "x_joint_attn_mask" in golden:
        found |= joint(model, golden, dtype)
    return found


def joint(model, golden, dtype):
    """Image and text in one sequence, with and without blocked attention (spec section 7)."""
    pixels = pixels_of(golden, "in_image", dtype)
    ids, mask = jnp.asarray(golden["in_text_ids"]), jnp.asarray(golden["in_text_masks"])
    rows = min(len(pixels), len(ids))
    first = model.embed_image(pixels)[:rows]
    tokens = jnp.concatenate([first, model.embed_text(ids)[:rows]], axis=1)
    both = jnp.concatenate([jnp.ones(first.shape[:2], mask.dtype), mask[:rows]], axis=1)
    split = first.shape[1]
    hidden = model.backbone(tokens, split=split, token_mask=both).tokens
    found = {"x_joint_backbone_out": hidden}
    for name, way in (("split", split), ("A", ALL_A), ("B", ALL_B)):
        found[f"x_joint_vl_out_{name}"] = model.vl(hidden, split=way, token_mask=both).tokens
        encoded = model.encode_joint(first, model.embed_text(ids)[:rows], mask[:rows], vl=name)
        whole = jnp.concatenate(encoded, axis=1)
        np.testing.assert_array_equal(whole, found[f"x_joint_vl_out_{name}"])
    blocked = jnp.asarray(golden["x_joint_attn_mask"])[None]
    causal = model.backbone(tokens, split=split, token_mask=both, blocked=blocked)
    found["x_joint_causal_backbone_out"] = causal.tokens
    return found


def agree(found, golden, limit):
    """Every output that the fixture has is within its limit; there must be some."""
    keys = sorted(set(found) & set(golden))
    assert "image_cls_vlffn_feats" in keys
    assert "text_cls_vlffn_feats" in keys
    for key in keys:
        assert found[key].shape == golden[key].shape, key
        error = np.abs(np.asarray(found[key]) - golden[key]).max()
        assert error <= limit(key), f"{key}: {error:.2e}"


def tolerance(key):
    """The stated absolute tolerance in float32."""
    return LOGITS if "logits" in key else FEATURES if "feats" in key else HIDDEN


@pytest.mark.parametrize("case", CASES)
def test_float32(case):
    golden = fixtures.arrays(case)
    agree(outputs(build(case, "float32"), golden, jnp.float32), golden, tolerance)


@pytest.mark.parametrize("case", DOUBLE_CASES)
def test_float64(case):
    inputs = fixtures.arrays(single(case))
    with jax.enable_x64(True):
        found = outputs(build(single(case), "float64"), inputs, jnp.float64)
    agree(found, fixtures.arrays(case), lambda key: DOUBLE)


@pytest.mark.parametrize("case", DOUBLE_CASES)
def test_the_reference_of_the_import_check(case):
    """What imports are checked against is the published model too, to the last digits."""
    inputs, weights = fixtures.arrays(single(case)), load_file(weights_of(single(case)))
    cfg = config_of(single(case))
    sizes = Sizes(cfg.heads, cfg.backbone_layers, cfg.vl_layers, cfg.patch_size)
    model = Reference(lambda name: weights[name].astype(np.float64), sizes)
    tokens = model.image_tokens(inputs["in_image"].transpose(0, 2, 3, 1).astype(np.float64))
    image, keep = model.backbone(tokens, "A"), inputs["in_text_masks"] != 0
    table = weights["backbone.text_embed.weight"].astype(np.float64)
    text = model.backbone(model.text_tokens(table.__getitem__, inputs["in_text_ids"]), "B", keep)
    found = {
        "image_backbone_out": image,
        "text_backbone_out": text,
        "image_cls_feats": model.head("itc_image_proj", image),
        "text_cls_feats": model.head("itc_text_proj", text),
        "image_cls_vlffn_feats": model.head("itc_vl_image_proj", model.vl(image, "A")),
        "text_cls_vlffn_feats": model.head("itc_vl_text_proj", model.vl(text, "A", keep)),
        "x_text_vl_out_B": model.vl(text, "B", keep),
    }
    agree(found, fixtures.arrays(case), lambda key: DOUBLE)


@pytest.mark.parametrize("case", CASES)
def test_convert_load_and_encode(case, tmp_path):
    """The way a user goes: one command, then the bundle's methods."""
    golden = fixtures.arrays(case)
    arch = str(case.with_suffix(".json"))
    report = m2jax.convert(weights_of(case), tmp_path / "m", arch=arch)
    assert all(row.passed for row in report.checks)
    bundle = m2jax.load(tmp_path / "m")
    image = bundle.encode_image(golden["in_image"].transpose(0, 2, 3, 1))
    text = bundle.encode_text(golden["in_text_ids"], golden["in_text_masks"])
    found = {
        "image_cls_vlffn_feats": image,
        "text_cls_vlffn_feats": text,
        "logits_per_image": bundle.logits(image, text),
    }
    agree(found, golden, tolerance)


def tanh_gelu(x):
    return jax.nn.gelu(x, approximate=True)


@pytest.mark.parametrize("case", OUR_CASES[:1])
@pytest.mark.parametrize("mistake", ["tanh", "eps", "b_weights"])
def test_single_mistakes_are_caught(monkeypatch, case, mistake):
    golden = fixtures.arrays(case)
    if mistake == "tanh":
        monkeypatch.setattr(layers, "gelu", tanh_gelu)
    if mistake == "eps":
        real = layers.standardise
        monkeypatch.setattr(layers, "standardise", lambda x, eps: real(x, eps / 10))
    if mistake == "b_weights":
        monkeypatch.setattr("m2jax.models.m2.ALL_A", multiway.ALL_B)
    text = build(case, "float32").encode_text(
        jnp.asarray(golden["in_text_ids"]), jnp.asarray(golden["in_text_masks"])
    )
    error = np.abs(np.asarray(text.features) - golden["text_cls_vlffn_feats"]).max()
    assert error > 4 * FEATURES
