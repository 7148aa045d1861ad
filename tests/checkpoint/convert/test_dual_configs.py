# SPDX-License-Identifier: Apache-2.0
"""Configs of three libraries, in and out; no key that may change the function goes unread."""

import copy
import dataclasses
import math

import pytest

from m2jax.checkpoint.convert import cn_clip, dual_tensors, hf_config, open_clip_config
from m2jax.checkpoint.convert.keys import same_function
from m2jax.config import UserError
from m2jax.config_dual import FAMILIES, Dual, Vision
from m2jax.models import params as params_lib
from m2jax.models.m2 import padded_vocab
from tests.models.dual_toys import TOYS

# The config.json of openai/clip-vit-base-patch32 in the parts that count.
CLIP_HF = {
    "model_type": "clip",
    "projection_dim": 512,
    "text_config_dict": None,
    "text_config": {"eos_token_id": 2, "bos_token_id": 0, "num_beams": 1, "dropout": 0.0},
    "vision_config": {"model_type": "clip_vision_model", "patch_size": 32},
    "torch_dtype": "float32",
    "transformers_version": None,
}
SIGLIP_HF = {"model_type": "siglip", "text_config": {}, "vision_config": {"image_size": 256}}
CHINESE_HF = {
    "model_type": "chinese_clip",
    "text_config": {"vocab_size": 21128, "directionality": "bidi", "pooler_fc_size": 768},
    "vision_config": {"patch_size": 16},
}
OPEN_CLIP = {
    "model_cfg": {
        "embed_dim": 768,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 224, "layers": 24, "width": 1024, "patch_size": 14},
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": 768,
            "heads": 12,
            "layers": 12,
        },
    },
    "preprocess_cfg": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]},
}
OPEN_CLIP_SIGLIP = {
    "model_cfg": {
        "embed_dim": 1152,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "image_size": 384,
            "timm_model_name": "vit_so400m_patch14_siglip_384",
            "timm_model_pretrained": False,
            "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": {
            "context_length": 64,
            "vocab_size": 32000,
            "hf_tokenizer_name": "timm/ViT-B-16-SigLIP",
            "tokenizer_kwargs": {"clean": "canonicalize"},
            "width": 1152,
            "heads": 16,
            "layers": 27,
            "mlp_ratio": 3.7362,
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
            "norm_kwargs": {"eps": 1e-6},
        },
    }
}


def test_the_defaults_of_transformers_fill_what_a_config_leaves_out():
    clip = hf_config.read(CLIP_HF, {}, "x")
    assert clip == Dual(text=dataclasses.replace(Dual().text, eos_id=2))
    siglip = hf_config.read(SIGLIP_HF, {"image_mean": [0.1, 0.2, 0.3]}, "x")
    assert (siglip.vision.activation, siglip.vision.eps) == ("gelu_tanh", 1e-6)
    assert (siglip.vision.patch_size, siglip.vision.image_size) == (16, 256)
    assert (siglip.vision.mean, siglip.vision.std) == ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    assert (siglip.out_dim, siglip.logit_bias, siglip.text.masked) == (768, True, False)
    chinese = hf_config.read(CHINESE_HF, {}, "x")
    assert (chinese.text.positions, chinese.text.eps, chinese.text.masked) == (512, 1e-12, True)
    assert (chinese.text.activation, chinese.vision.activation) == ("gelu", "quick_gelu")


@pytest.mark.parametrize(
    ("config", "published"),
    [
        (CLIP_HF, 151_277_313),  # openai/clip-vit-base-patch32
        (SIGLIP_HF | {"vision_config": {}}, 203_155_970),  # google/siglip-base-patch16-224
        (CHINESE_HF, 188_262_913),  # OFA-Sys/chinese-clip-vit-base-patch16
    ],
)
def test_published_sizes_have_their_number_of_parameters(config, published):
    """As transformers counts them for these configs."""
    cfg = hf_config.read(config, {}, "x")
    sizes = dual_tensors.shapes(cfg, "hf").values()
    assert sum(math.prod(shape) for shape in sizes) == published
    padding = (padded_vocab(cfg.text.vocab_size) - cfg.text.vocab_size) * cfg.text.width
    assert params_lib.count(params_lib.abstract(cfg).params) == published + padding


def test_clip_pools_where_its_config_says():
    config = copy.deepcopy(CLIP_HF)
    config["text_config"]["eos_token_id"] = 49407
    text = hf_config.read(config, {}, "x").text
    assert (text.pooling, text.eos_id) == ("eos", 49407)
    assert hf_config.read(CLIP_HF, {}, "x").text.pooling == "argmax"


def test_open_clip_configs():
    clip = open_clip_config.read(OPEN_CLIP, "x")
    assert (clip.vision.heads, clip.vision.mlp_width, clip.text.mlp_width) == (16, 4096, 3072)
    assert (clip.vision.activation, clip.vision.mean) == ("quick_gelu", (0.4, 0.5, 0.6))
    siglip = open_clip_config.read(OPEN_CLIP_SIGLIP, "x")
    assert (siglip.vision.layers, siglip.vision.mlp_width, siglip.text.mlp_width) == (
        27,
        4304,
        4304,
    )
    assert (siglip.vision.activation, siglip.text.activation) == ("gelu", "gelu")
    named = copy.deepcopy(OPEN_CLIP_SIGLIP)
    named["model_cfg"]["vision_cfg"]["timm_model_name"] = "vit_so400m_patch16_siglip_384"
    assert open_clip_config.read(named, "x").vision.activation == "gelu_tanh"


@pytest.mark.parametrize("config", [CLIP_HF, SIGLIP_HF, CHINESE_HF])
def test_hf_out_and_in_again(config):
    cfg = hf_config.read(config, {}, "x")
    assert same_function(hf_config.read(hf_config.write(cfg), {}, "y"), cfg)


@pytest.mark.parametrize("config", [OPEN_CLIP, OPEN_CLIP_SIGLIP])
def test_open_clip_out_and_in_again(config):
    cfg = open_clip_config.read(config, "x")
    again = open_clip_config.read(open_clip_config.write(cfg, {}), "y")
    assert same_function(again, cfg)


@pytest.mark.parametrize(
    ("group", "key", "value"),
    [
        ("", "logit_scale_cap", 3),
        ("text_config", "rope_theta", 10000.0),
        ("vision_config", "num_channels", 4),
        ("vision_config", "qk_norm", True),
        ("vision_config", "hidden_act", "relu"),
        ("vision_config", "hidden_size", "768"),
        ("vision_config", "num_hidden_layers", True),
        ("text_config", "eos_token_id", [1, 2]),
        ("text_config", "num_attention_heads", 7),
    ],
)
def test_an_hf_key_that_may_change_the_function_is_refused_by_name(group, key, value):
    config = copy.deepcopy(CLIP_HF)
    (config[group] if group else config)[key] = value
    with pytest.raises(UserError, match=rf"config\.json.*{'heads' if value == 7 else key}"):
        hf_config.read(config, {}, "config.json")


@pytest.mark.parametrize("mean", [0.5, [0.5], [0.5, 0.5, "0.5"], None])
def test_normalisation_is_three_numbers(mean):
    with pytest.raises(UserError, match=r"vision\.mean"):
        hf_config.read(CLIP_HF, {"image_mean": mean}, "x")
    with pytest.raises(UserError, match=r"vision\.mean"):
        open_clip_config.read(OPEN_CLIP | {"preprocess_cfg": {"mean": mean}}, "x")


def test_a_historic_copy_of_a_group_must_agree():
    with pytest.raises(UserError, match="vision_config_dict says otherwise"):
        hf_config.read(CLIP_HF | {"vision_config_dict": {"patch_size": 16}}, {}, "x")
    hf_config.read(CLIP_HF | {"vision_config_dict": {"patch_size": 32}}, {}, "x")


@pytest.mark.parametrize(
    ("group", "key", "value"),
    [
        ("model_cfg", "multimodal_cfg", {}),
        ("vision_cfg", "ls_init_value", 1e-5),
        ("vision_cfg", "layers", [3, 4, 6, 3]),
        ("vision_cfg", "pool_type", "avg"),
        ("vision_cfg", "timm_model_name", "vit_base_patch16_224"),
        ("text_cfg", "hf_model_name", "xlm-roberta-base"),
        ("text_cfg", "norm_kwargs", {"bias": False}),
        ("text_cfg", "proj_bias", True),
        ("text_cfg", "width", "768"),
        ("vision_cfg", "image_size", "224"),
        ("vision_cfg", "width", float("inf")),
        ("text_cfg", "act_kwargs", ["tanh"]),
    ],
)
def test_an_open_clip_key_that_may_change_the_function_is_refused_by_name(group, key, value):
    config = copy.deepcopy(OPEN_CLIP)
    model = config["model_cfg"]
    (model if group == "model_cfg" else model[group])[key] = value
    wrong_type = value in ("768", float("inf"))
    words = "wrong type" if wrong_type else key
    with pytest.raises(UserError, match=rf"o\.json.*{words}"):
        open_clip_config.read(config, "o.json")


@pytest.mark.parametrize("config", [{}, {"model_type": "blip"}, {"model_type": ["clip"]}])
def test_other_models_are_refused(config):
    with pytest.raises(UserError, match="model_type"):
        hf_config.read(config, {}, "x")


@pytest.mark.parametrize("group", ["vision_config", "text_config", "vision_config_dict"])
@pytest.mark.parametrize("value", [3, "x", [1]])
def test_a_group_that_is_none_is_refused(group, value):
    with pytest.raises(UserError, match="no group of keys"):
        hf_config.read(CLIP_HF | {group: value}, {}, "x")


def test_what_a_library_cannot_hold_is_not_written():
    tanh = dataclasses.replace(Dual().vision, activation="gelu_tanh")
    with pytest.raises(UserError, match="use --format hf"):
        open_clip_config.write(Dual(vision=tanh), {})  # open_clip has one activation for both
    bare = dataclasses.replace(Dual().vision, pre_norm=False)
    with pytest.raises(UserError, match="use --format open-clip"):
        hf_config.write(Dual(vision=bare))
    with pytest.raises(UserError, match="no SigLIP model of these sizes"):
        open_clip_config.write(TOYS["siglip"], {})
    base = hf_config.read(SIGLIP_HF, {}, "x")  # tanh there, erf in timm's model of this name
    with pytest.raises(UserError, match="vit_base_patch16_siglip_256 differs"):
        open_clip_config.write(base, {})


def wide_heads(cfg):
    """The toy with heads of the width that cn_clip gives its releases."""
    vision, text = (
        dataclasses.replace(tower, width=128, heads=2) for tower in (cfg.vision, cfg.text)
    )
    vision = dataclasses.replace(vision, image_size=16)
    return dataclasses.replace(cfg, vision=vision, text=text)


def test_cn_clip_shapes_say_the_config():
    cfg = wide_heads(TOYS["chinese-clip"])
    shapes = dual_tensors.shapes(cfg, "open-clip")
    assert cn_clip.is_ours(shapes)
    assert same_function(cn_clip.infer(shapes, "x"), cfg)
    del shapes["text_projection"]
    with pytest.raises(UserError, match="text_projection"):
        cn_clip.infer(shapes, "x")
    with pytest.raises(UserError, match="ResNet"):
        cn_clip.infer(shapes | {"visual.layer1.0.conv1.weight": (1, 1, 1, 1)}, "x")


@pytest.mark.parametrize("family", FAMILIES)
def test_idle_settings_are_no_other_function(family):
    cfg = TOYS[family]
    assert same_function(dataclasses.replace(cfg, unroll=4, dtype="bfloat16"), cfg)
    other = dataclasses.replace(cfg, vision=dataclasses.replace(cfg.vision, eps=2e-5))
    assert not same_function(other, cfg)
    assert isinstance(cfg.vision, Vision)
