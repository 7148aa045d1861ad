# SPDX-License-Identifier: Apache-2.0
"""m2jax against the PyTorch implementations: same random weights, same embeddings."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from m2jax.checkpoint.convert import cn_clip, dual_tensors, hf_config, open_clip_config
from m2jax.checkpoint.convert.check import LIMIT
from m2jax.checkpoint.convert.dual_reference import Reference
from m2jax.models import params as params_lib
from tests.checkpoint.convert import torch_toys
from tests.checkpoint.convert.torch_toys import END
from tests.models.dual_toys import placed

pytestmark = pytest.mark.torch

HF = {
    "clip": ("clip", {"text": {"eos_token_id": 2}}),  # argmax
    "clip-eos": ("clip", {"text": {"eos_token_id": 50}}),
    "clip-gelu": ("clip", {"text": {"hidden_act": "gelu"}, "vision": {"hidden_act": "gelu"}}),
    "siglip": ("siglip", {}),
    "siglip-projected": ("siglip", {"text": {"projection_size": 64, "hidden_size": 32}}),
    "chinese-clip": ("chinese-clip", {}),
}


@dataclasses.dataclass
class Case:
    """One model of another library with what it says of the probes."""

    cfg: object
    layout: str
    tensors: dict
    probes: tuple  # pixels, ids, mask
    wanted: tuple  # image and text embeddings


@functools.cache
def hf_case(name):
    kind, changes = HF[name]
    model = torch_toys.hf(kind, **changes)
    cfg = hf_config.read(model.config.to_dict(), {}, "config.json")
    table, mask = torch_toys.ids(eos=50 if name == "clip-eos" else END)
    pixels = torch_toys.pixels(cfg.vision.image_size)
    wanted = torch_toys.hf_features(model, cfg, pixels, table, mask)
    return Case(cfg, "hf", torch_toys.tensors(model), (pixels, table, mask), wanted)


def open_clip_case(model_cfg):
    model = torch_toys.open_clip(model_cfg)
    cfg = open_clip_config.read({"model_cfg": model_cfg}, "open_clip_config.json")
    return own_case(model, cfg)


def own_case(model, cfg):
    table, mask = torch_toys.ids(eos=END)
    pixels = torch_toys.pixels(cfg.vision.image_size)
    wanted = torch_toys.features(model, cfg, pixels, table)
    return Case(cfg, "open-clip", torch_toys.tensors(model), (pixels, table, mask), wanted)


def apart(case, cfg=None, spoil=lambda params: None):
    """The largest difference of the features, image and text, of a model read as ``cfg``."""
    params = jax.tree.map(np.asarray, placed(case.tensors, case.cfg, case.layout))
    spoil(params)
    model = params_lib.bind(params_lib.abstract(cfg or case.cfg).graph, params)
    pixels, table, mask = case.probes
    ours = model.encode_image(pixels).features, model.encode_text(table, mask).features
    return [float(np.abs(a - b).max()) for a, b in zip(ours, case.wanted, strict=True)]


def check(case):
    image, text = apart(case)
    print(f"{case.cfg.family} {case.layout}: image {image:.1e}, text {text:.1e}")
    assert max(image, text) < LIMIT
    check_reference(case)
    release = dual_tensors.Release(
        placed(case.tensors, case.cfg, case.layout), case.cfg, case.layout
    )
    for name, tensor in release.items():
        np.testing.assert_array_equal(tensor, case.tensors[name], err_msg=name)


def check_reference(case):
    """The NumPy forward that imports are checked against gives the same embeddings."""
    model = Reference(lambda name: case.tensors[name].astype(np.float64), case.cfg, case.layout)
    pixels, table, mask = case.probes
    text = model.text(lambda name, ids: case.tensors[name][ids].astype(np.float64), table, mask)
    for ours, wanted in zip((model.image(pixels), text), case.wanted, strict=True):
        np.testing.assert_allclose(ours, wanted, atol=2e-6)


@pytest.mark.parametrize("name", HF)
def test_transformers(name):
    check(hf_case(name))


@pytest.mark.parametrize(
    "changes",
    [
        {"quick_gelu": True},
        {"quick_gelu": False},
        {"text_cfg": {"context_length": 12, "vocab_size": 90, "width": 64, "heads": 4, "layers": 3,
                      "pool_type": "eos", "eos_id": END, "act_kwargs": {"approximate": "tanh"},
                      "norm_kwargs": {"eps": 1e-6}}},
        {"vision_cfg": {"image_size": 32, "patch_size": 8, "layers": 3, "width": 64,
                        "head_width": 16, "mlp_ratio": 1.7, "no_ln_pre": True}},
    ],
    ids=["quick_gelu", "gelu", "text", "vision"],
)  # fmt: skip
def test_open_clip(changes):
    check(open_clip_case(torch_toys.open_clip_cfg(**changes)))


def test_open_clip_siglip(monkeypatch):
    trunk = open_clip_config.Trunk(width=64, layers=3, heads=4, mlp_width=96)
    monkeypatch.setitem(open_clip_config.TRUNKS, "base", trunk)
    check(open_clip_case(torch_toys.open_clip_siglip_cfg()))


def test_cn_clip():
    model = torch_toys.cn_clip()
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    check(own_case(model, cn_clip.infer(shapes, "clip_cn_vit.pt")))


def test_sizes_and_activations_of_timm_by_name():
    """What the table says of SigLIP's vision models is what timm builds under their names."""
    torch = torch_toys.torch()
    timm = pytest.importorskip("timm")
    names = [n for n in timm.list_models("vit_*_siglip_*") if "_gap_" not in n]
    names = [n for n in names if open_clip_config._TRUNK_NAME.fullmatch(n)]
    assert len(names) >= 15
    for name in set(names) - {torch_toys.TIMM_NAME}:
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=0)
        cfg = open_clip_config._trunk(
            {"timm_model_name": name, "timm_pool": "map", "timm_proj": "none"}, {}, "x"
        )
        block = model.blocks[0]
        built = (len(model.blocks), model.embed_dim, block.attn.num_heads)
        assert built == (cfg.layers, cfg.width, cfg.heads), name
        assert block.mlp.fc1.out_features == cfg.mlp_width, name
        assert model.attn_pool.mlp.fc1.out_features == cfg.mlp_width, name
        assert model.attn_pool.num_heads == cfg.heads, name
        assert model.pos_embed.shape[1] == (cfg.image_size // cfg.patch_size) ** 2, name
        assert model.patch_embed.proj.kernel_size == (cfg.patch_size, cfg.patch_size), name
        assert block.norm1.eps == model.norm.eps == model.attn_pool.norm.eps == cfg.eps, name
        exact = "approximate='tanh'" not in repr(block.mlp.act) and "Tanh" not in repr(
            block.mlp.act
        )
        assert exact == (cfg.activation == "gelu"), name


def vision(**changes):
    return lambda cfg: dataclasses.replace(cfg, vision=dataclasses.replace(cfg.vision, **changes))


def text(**changes):
    return lambda cfg: dataclasses.replace(cfg, text=dataclasses.replace(cfg.text, **changes))


def without_pre_norm(params):
    del params["vision"]["pre_norm"]


def swapped(tower, a, b):
    def spoil(params):
        blocks = params[tower]["stack"]["blocks"]
        blocks[a], blocks[b] = blocks[b], blocks[a]

    return spoil


def other_segment(params):
    params["text"]["types"] = params["text"]["types"][::-1]


def no_head_bias(params):
    params["text"]["head"]["bias"] = np.zeros_like(params["text"]["head"]["bias"])


def same(cfg):
    return cfg


def keep(params):
    pass


MISTAKES = {  # case, what is misread, which parameters are spoilt, 0 image or 1 text
    "gelu for quick_gelu, image": ("clip", vision(activation="gelu"), keep, 0),
    "gelu for quick_gelu, text": ("clip", text(activation="gelu"), keep, 1),
    "gelu for its tanh form, image": ("siglip", vision(activation="gelu"), keep, 0),
    "gelu for its tanh form, text": ("siglip", text(activation="gelu"), keep, 1),
    "epsilon, CLIP image": ("clip", vision(eps=1e-6), keep, 0),
    "epsilon, CLIP text": ("clip", text(eps=1e-6), keep, 1),
    "epsilon, SigLIP image": ("siglip", vision(eps=1e-5), keep, 0),
    "epsilon, SigLIP text": ("siglip", text(eps=1e-5), keep, 1),
    "epsilon, BERT": ("chinese-clip", text(eps=1e-6), keep, 1),
    "no ln_pre": ("clip", vision(pre_norm=False), without_pre_norm, 0),
    "mean": ("clip", vision(mean=(0.5, 0.5, 0.5)), keep, 0),
    "standard deviation": ("clip", vision(std=(0.5, 0.5, 0.5)), keep, 0),
    "pooled at the last token": ("clip", text(pooling="last"), keep, 1),
    "pooled at the largest id": ("clip-eos", text(pooling="argmax"), keep, 1),
    "pooled at the first token": ("siglip", text(pooling="first"), keep, 1),
    "pooled at the last token, BERT": ("chinese-clip", text(pooling="last"), keep, 1),
    "no causal mask": ("clip", text(causal=False), keep, 1),
    "a causal mask": ("siglip", text(causal=True), keep, 1),
    "padding seen": ("chinese-clip", text(masked=False), keep, 1),
    "padding hidden": ("siglip", text(masked=True), keep, 1),
    "the other segment": ("chinese-clip", same, other_segment, 1),
    "no bias on the head": ("siglip", same, no_head_bias, 1),
    "pre-norm for post-norm": ("chinese-clip", text(post_norm=False), keep, 1),
    "queries for keys, image": ("clip", same, swapped("vision", "q", "k"), 0),
    "queries for keys, text": ("clip", same, swapped("text", "q", "k"), 1),
    "norms exchanged, BERT": ("chinese-clip", same, swapped("text", "attn_norm", "ffn_norm"), 1),
    "heads of another width": ("clip", vision(heads=8), keep, 0),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_shows(mistake):
    name, misread, spoil, modality = MISTAKES[mistake]
    case = hf_case(name)  # which test_transformers shows to be read right
    assert apart(case, misread(case.cfg), spoil)[modality] > LIMIT
