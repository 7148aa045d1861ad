# SPDX-License-Identifier: Apache-2.0
"""Small models of the PyTorch libraries with random weights, for the torch lane."""

import sys
import warnings

import numpy as np
import pytest
from PIL import Image

TOWER = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
VISION = TOWER | {"image_size": 30, "patch_size": 8}  # 30 is no multiple of 8: the rest is unseen
TEXT = TOWER | {"vocab_size": 90, "max_position_embeddings": 12}
BATCH, LENGTH, PAD = 4, 12, 0
END = TEXT["vocab_size"] - 1  # the largest id of the toys

_OPERATORS = []  # what is defined lives as long as this


def torch():
    """PyTorch, and torchvision made to import beside a CPU build that lacks its operators."""
    module = pytest.importorskip("torch")
    if "torchvision" not in sys.modules:
        _OPERATORS.append(module.library.Library("torchvision", "FRAGMENT"))
        for name in ("nms", "qnms"):
            signature = f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            _OPERATORS[0].define(signature)
        import torchvision  # noqa: F401
    return module


def randomise(model, seed=0):
    """Every parameter random and away from 0 and 1, so that each one counts.

    Embeddings are small, so that the epsilon of the first norm counts too.
    """
    t = torch()
    generator = t.Generator().manual_seed(seed)
    with t.no_grad():
        for name, parameter in model.named_parameters():
            noise = t.randn(parameter.shape, generator=generator)
            if name.endswith("logit_scale"):
                parameter.fill_(2.1)
            elif name.endswith("logit_bias"):
                parameter.fill_(-3.7)
            elif any(part in name for part in ("embed", "conv1")) and "Norm" not in name:
                parameter.copy_(0.01 * noise)
            elif name.endswith(("probe", "latent")):
                parameter.copy_(noise)
            elif parameter.ndim >= 2:
                parameter.copy_(noise * (1.5 / parameter[0].numel() ** 0.5))
            elif name.endswith("weight"):  # of a norm
                parameter.copy_(1.0 + 0.3 * noise)
            else:
                parameter.copy_(0.3 * noise)
    return model.eval()


def hf(kind, **changes):
    """A transformers model of one family."""
    torch()
    import transformers

    text, vision = TEXT | changes.pop("text", {}), VISION | changes.pop("vision", {})
    names = {"clip": "CLIP", "siglip": "Siglip", "chinese-clip": "ChineseCLIP"}
    config = getattr(transformers, f"{names[kind]}Config")
    shared = {} if kind == "siglip" else {"projection_dim": 48}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cfg = config(text_config=text, vision_config=vision, **shared, **changes)
        return randomise(getattr(transformers, f"{names[kind]}Model")(cfg))


def picture(width, height):
    """A PIL image of noise."""
    noise = np.random.default_rng(2).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def pixels(size):
    """Images in [0, 1], [b, size, size, 3]."""
    return np.random.default_rng(0).random((BATCH, size, size, 3), np.float32)


def ids(vocab=90, eos=None):
    """Token ids and mask; texts of different lengths, padded on the right."""
    rng = np.random.default_rng(1)
    table = rng.integers(3, vocab - 2, (BATCH, LENGTH)).astype(np.int32)
    mask = np.arange(LENGTH) < np.array([12, 5, 8, 3])[:, None]
    table[~mask] = PAD
    if eos is not None:
        table[np.arange(BATCH), mask.sum(1) - 1] = eos
    return table, mask


def unit(x):
    """Rows of unit length, as NumPy."""
    x = x.detach().numpy()
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def normalised(cfg, images):
    """What the PyTorch models take: standardised, channels first."""
    x = (images - np.array(cfg.vision.mean)) / np.array(cfg.vision.std)
    return torch().from_numpy(x.transpose(0, 3, 1, 2).astype(np.float32))


def hf_features(model, cfg, images, table, mask):
    """Image and text embeddings of a transformers model; SigLIP is run without a mask."""
    t = torch()
    with t.no_grad():
        image = model.get_image_features(pixel_values=normalised(cfg, images))
        mask = None if cfg.family == "siglip" else t.from_numpy(mask.astype(np.int64))
        text = model.get_text_features(t.from_numpy(table.astype(np.int64)), attention_mask=mask)
    return tuple(unit(getattr(x, "pooler_output", x)) for x in (image, text))


def features(model, cfg, images, table):
    """Image and text embeddings of an open_clip or cn_clip model, which mask by themselves."""
    t = torch()
    with t.no_grad():
        image = model.encode_image(normalised(cfg, images))
        text = model.encode_text(t.from_numpy(table.astype(np.int64)))
    return unit(image), unit(text)


def open_clip(model_cfg):
    """An open_clip model of a ``model_cfg``, built as its factory does."""
    torch()
    library = pytest.importorskip("open_clip")
    cfg = dict(model_cfg)
    kind = library.CustomTextCLIP if cfg.pop("custom_text", False) else library.CLIP
    return randomise(kind(**cfg))


def open_clip_cfg(**changes):
    """The ``model_cfg`` of a small CLIP."""
    vision = {"image_size": 32, "patch_size": 8, "layers": 3, "width": 64, "head_width": 16}
    text = {"context_length": 12, "vocab_size": 90, "width": 64, "heads": 4, "layers": 3}
    return {"embed_dim": 48, "vision_cfg": vision, "text_cfg": text} | changes


TIMM_NAME = "vit_base_patch8_siglip_24"  # no model of timm's own


def open_clip_siglip_cfg():
    """The ``model_cfg`` of a small SigLIP, its vision model registered in timm."""
    torch()
    timm = pytest.importorskip("timm")
    from timm.models.vision_transformer import VisionTransformer

    if not timm.is_model(TIMM_NAME):

        def build(pretrained=False, **settings):
            sizes = {"img_size": 24, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 4}
            known = {"num_classes": settings["num_classes"], "mlp_ratio": 1.5}
            model = VisionTransformer(**sizes, **known, class_token=False, global_pool="map")
            model.pretrained_cfg = model.default_cfg = {}
            return model

        build.__name__, build.__module__ = TIMM_NAME, "timm.models.vision_transformer"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            timm.models.register_model(build)
    vision = {
        "image_size": 24,
        "timm_model_name": TIMM_NAME,
        "timm_pool": "map",
        "timm_proj": "none",
        "timm_model_pretrained": False,
    }
    text = {
        **{"context_length": 12, "vocab_size": 90, "width": 64, "heads": 4, "layers": 3},
        **{"no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
        "norm_kwargs": {"eps": 1e-6},
    }
    return {
        "embed_dim": 64,
        "custom_text": True,
        "init_logit_bias": -10,
        "vision_cfg": vision,
        "text_cfg": text,
    }


def cn_clip():
    """A small Chinese-CLIP of the authors' own code; its heads are 64 wide."""
    torch()
    pytest.importorskip("cn_clip")
    from cn_clip.clip.model import CLIP

    model = CLIP(
        embed_dim=48,
        image_resolution=32,
        vision_layers=2,
        vision_width=128,
        vision_patch_size=8,
        vocab_size=90,
        text_attention_probs_dropout_prob=0.1,
        text_hidden_act="gelu",
        text_hidden_dropout_prob=0.1,
        text_hidden_size=128,
        text_initializer_range=0.02,
        text_intermediate_size=96,
        text_max_position_embeddings=12,
        text_num_attention_heads=2,
        text_num_hidden_layers=2,
        text_type_vocab_size=2,
    )
    return randomise(model)


def tensors(model):
    """The state dict as NumPy."""
    return {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
