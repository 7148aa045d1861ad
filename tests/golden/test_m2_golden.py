# SPDX-License-Identifier: Apache-2.0
"""The published model's own numbers; cases are found by listing the folder."""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from m2jax.checkpoint.convert.m2_names import slots
from m2jax.config import Model, resolve
from m2jax.models import layers, multiway
from m2jax.models import params as params_lib
from m2jax.models.multiway import ALL_A, ALL_B

FOLDER = Path(os.environ.get("M2JAX_GOLDEN", Path(__file__).parent)) / "m2"
CASES = sorted(p.with_suffix("") for p in FOLDER.glob("*.safetensors"))
FEATURES, HIDDEN, LOGITS, DOUBLE = 2e-6, 2e-5, 3e-5, 1e-9


def build(case, dtype):
    """The model of a case, with the official tensors put where they belong."""
    sizes = json.loads(case.with_suffix(".json").read_text())
    cfg = resolve(
        Model(
            name="m2-encoder-0.4b",
            width=sizes["encoder_embed_dim"],
            heads=sizes["encoder_attention_heads"],
            out_dim=sizes["out_embed_dim"],
            backbone_layers=sizes["encoder_layers"],
            vl_layers=sizes["beit3_vl_layers"],
            image_size=sizes["image_size"],
            patch_size=sizes["patch_size"],
            vocab_size=sizes["vocab_size"],
            max_text_len=sizes["max_text_len"],
            dtype=dtype,
            param_dtype=dtype,
        )
    )
    model = params_lib.abstract(cfg)
    arrays = {n: np.zeros(s.shape, dtype) for n, s in params_lib.flatten(model.params).items()}
    official = load_file(case.with_suffix(".safetensors"))
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


def outputs(model, golden, dtype):
    """Everything a fixture may hold, by its key."""
    image = model.encode_image(
        jnp.asarray(golden["in_image"].transpose(0, 2, 3, 1), dtype), capture=True
    )
    text = model.encode_text(
        jnp.asarray(golden["in_text_ids"]), jnp.asarray(golden["in_text_masks"]), capture=True
    )
    logits = jnp.exp(model.logit_scale[...]) * image.features @ text.features.T
    return {
        "image_cls_vlffn_feats": image.features,
        "image_cls_feats": image.backbone_features,
        "text_cls_vlffn_feats": text.features,
        "text_cls_feats": text.backbone_features,
        "image_layers_backbone": image.backbone.layers,
        "image_layers_vl": image.vl.layers,
        "text_layers_backbone": text.backbone.layers,
        "text_layers_vl": text.vl.layers,
        "image_backbone_out": image.backbone.tokens,
        "image_vl_out": image.vl.tokens,
        "text_backbone_out": text.backbone.tokens,
        "text_vl_out": text.vl.tokens,
        "logits_per_image": logits,
        "probs_per_image": jax.nn.softmax(logits, axis=-1),
    } | joint(model, golden, text, dtype)


def joint(model, golden, text, dtype):
    """Image and text in one sequence, masks, and B weights in the vl layers (spec section 7)."""
    pixels = jnp.asarray(golden["in_image"].transpose(0, 2, 3, 1), dtype)
    ids, mask = jnp.asarray(golden["in_text_ids"]), jnp.asarray(golden["in_text_masks"])
    found = {"x_text_vl_out_B": model.vl(text.backbone.tokens, split=ALL_B, token_mask=mask).tokens}
    masked = jnp.asarray(golden["in_image_masked_position"]) != 0
    tokens = model.embed_image(pixels, masked=masked)
    found["x_image_masked_backbone_out"] = model.backbone(tokens, split=ALL_A).tokens
    rows = min(len(pixels), len(ids))
    first = model.embed_image(pixels)[:rows]
    tokens = jnp.concatenate([first, model.embed_text(ids)[:rows]], axis=1)
    both = jnp.concatenate([jnp.ones(first.shape[:2], mask.dtype), mask[:rows]], axis=1)
    split = first.shape[1]
    hidden = model.backbone(tokens, split=split, token_mask=both).tokens
    found["x_joint_backbone_out"] = hidden
    for name, way in (("split", split), ("A", ALL_A), ("B", ALL_B)):
        found[f"x_joint_vl_out_{name}"] = model.vl(hidden, split=way, token_mask=both).tokens
    blocked = jnp.asarray(golden["x_joint_attn_mask"])[None]
    causal = model.backbone(tokens, split=split, token_mask=both, blocked=blocked)
    found["x_joint_causal_backbone_out"] = causal.tokens
    if "in_image_nonsquare" in golden:
        odd = jnp.asarray(golden["in_image_nonsquare"].transpose(0, 2, 3, 1), dtype)
        encoded = model.encode_image(odd)
        found["x_image_nonsquare_cls_vlffn_feats"] = encoded.features
        found["x_image_nonsquare_backbone_out"] = encoded.backbone.tokens
    return found


def tolerance(key):
    """The stated absolute tolerance in float32."""
    return FEATURES if "feats" in key else LOGITS if "logits" in key else HIDDEN


@pytest.mark.skipif(not CASES, reason=f"{FOLDER} holds no M2 fixture")
@pytest.mark.parametrize("case", CASES, ids=lambda p: p.name)
def test_float32(case):
    golden = dict(np.load(case.with_suffix(".npz")))
    found = outputs(build(case, "float32"), golden, jnp.float32)
    for key in sorted(set(found) & set(golden)):
        error = np.abs(np.asarray(found[key]) - golden[key]).max()
        assert error <= tolerance(key), f"{key}: {error:.2e}"
    assert len(set(found) & set(golden)) >= 20


@pytest.mark.skipif(not CASES, reason=f"{FOLDER} holds no M2 fixture")
@pytest.mark.parametrize("case", CASES, ids=lambda p: p.name)
def test_float64(case):
    inputs = dict(np.load(case.with_suffix(".npz")))
    golden = dict(np.load(case.with_name(case.name + "_f64.npz")))
    with jax.enable_x64(True):
        found = outputs(build(case, "float64"), inputs, jnp.float64)
        for key in sorted(set(found) & set(golden)):
            error = np.abs(np.asarray(found[key]) - golden[key]).max()
            assert error <= DOUBLE, f"{key}: {error:.2e}"
    assert len(set(found) & set(golden)) >= 14


def tanh_gelu(x):
    return jax.nn.gelu(x, approximate=True)


@pytest.mark.skipif(not CASES, reason=f"{FOLDER} holds no M2 fixture")
@pytest.mark.parametrize("mistake", ["tanh", "eps", "b_weights"])
def test_single_mistakes_are_caught(monkeypatch, mistake):
    case = CASES[0]
    golden = dict(np.load(case.with_suffix(".npz")))
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
