# SPDX-License-Identifier: Apache-2.0
"""The release's config keys."""

import json

import pytest

from m2jax import architectures
from m2jax.checkpoint.convert import m2_arch
from m2jax.config import UserError
from tests.checkpoint.convert import m2_files

# What the release's own files set (spec section 1).
COMMON = {
    "beit3_vl_layers": 3,
    "vocab_size": 115244,
    "flash_attn": True,
    "whole_word_masking": True,
    "precision": 32,
}
LARGE = {"encoder_layers": 21, "image_size": 224, "visual_mask_size": 14, "out_embed_dim": 1024}
RELEASED = {
    "m2-encoder-0.4b": {"encoder_layers": 9},
    "m2-encoder-1b": {"beit_version": "large", "encoder_embed_dim": 1024, **LARGE},
    "m2-encoder-10b": {"beit_version": "huge", "encoder_embed_dim": 4096, **LARGE},
}


@pytest.mark.parametrize("name", RELEASED)
def test_the_released_files_mean_the_named_sizes(name, tmp_path):
    file = tmp_path / "Encoder.json"
    file.write_text(json.dumps(COMMON | RELEASED[name]))
    read = m2_arch.read(str(file))
    assert read.model == m2_arch.read(name).model
    assert read.model.name == name
    assert {"flash_attn", "precision"} <= set(read.without_effect)


@pytest.mark.parametrize("name", architectures.ARCHITECTURES)
def test_official_keys_round_trip(name):
    model = m2_arch.read(name).model
    assert m2_arch.from_official(m2_arch.to_official(model), "x").model == model


def test_missing_keys_are_the_smallest_models():
    assert m2_arch.from_official({}, "x").model == m2_arch.read("m2-encoder-0.4b").model
    huge = m2_arch.from_official({"beit_version": "huge", "encoder_embed_dim": 64}, "x").model
    assert (huge.heads, huge.width, huge.backbone_layers) == (32, 64, 9)
    assert m2_files.MODEL.heads == 2  # said beats implied


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"encoder_embed_dims": 64}, "encoder_embed_dims: no key of the release"),
        ({"encoder_layers": 0}, "give a whole number above 0"),
        ({"encoder_layers": 10**9}, "at most 512"),  # would take hours to list its tensors
        ({"vocab_size": 10**30}, "at most 16,777,216"),
        ({"image_size": 2**20}, "at most 8,192"),
        ({"max_text_len": 1023}, "at most 1,022"),
        ({"encoder_layers": True}, "give a whole number above 0"),
        ({"encoder_layers": "9"}, "give a whole number above 0"),
        ({"beit_version": "giant"}, "use one of base, large, huge"),
        ({"beit_version": ["base"]}, "use one of base, large, huge"),
        ({"share_attn": True}, "share_attn is True: this model is only ever False"),
        ({"mask_ratio": 0.5}, "only ever 0"),
        ({"encoder_embed_dim": 100}, "not a multiple of model.heads"),
    ],
)
def test_what_cannot_be_is_refused(keys, match):
    with pytest.raises(UserError, match=match):
        m2_arch.from_official(keys, "--arch F")


def test_arch_names_a_model_or_a_file(tmp_path):
    with pytest.raises(UserError, match=r"use one of m2-encoder-0.4b"):
        m2_arch.read("m2-encoder-2b")
    with pytest.raises(UserError, match="No such file"):
        m2_arch.read(str(tmp_path / "none.json"))
    (tmp_path / "deep.json").write_text("[" * 200_000)
    with pytest.raises(UserError, match="not a JSON file"):
        m2_arch.read(str(tmp_path / "deep.json"))
    for text, match in (("[1]", "no JSON object"), ("{", "not a JSON file")):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(UserError, match=match):
            m2_arch.read(str(tmp_path / "x.json"))
