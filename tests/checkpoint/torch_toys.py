# SPDX-License-Identifier: Apache-2.0
"""Small models of the PyTorch libraries with random weights, for the torch lane."""

import importlib.util
import warnings

import numpy as np
import pytest

TOWER = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
VISION = TOWER | {"image_size": 30, "patch_size": 8}  # 30 is no multiple of 8: the rest is unseen
TEXT = TOWER | {"vocab_size": 90, "max_position_embeddings": 12}
BATCH, LENGTH, PAD = 4, 12, 0


def torch():
    """PyTorch, and torchvision made to import beside a CPU build that lacks its operators."""
    module = pytest.importorskip("torch")
    if importlib.util.find_spec("torchvision") and not hasattr(torch, "library"):
        library = module.library.Library("torchvision", "DEF")
        boxes = "Tensor dets, Tensor scores, float iou_threshold"
        for name, arguments in (("nms", boxes), ("qnms", boxes)):
            library.define(f"{name}({arguments}) -> Tensor")
        torch.library = library  # it lives as long as the process
    return module


def randomise(model, seed=0):
    """Every parameter random and away from 0 and 1, so that each one counts."""
    t = torch()
    generator = t.Generator().manual_seed(seed)
    with t.no_grad():
        for name, parameter in model.named_parameters():
            noise = t.randn(parameter.shape, generator=generator)
            if name.endswith("logit_scale"):
                parameter.fill_(2.1)
            elif name.endswith("logit_bias"):
                parameter.fill_(-3.7)
            elif parameter.ndim >= 2 and "embed" not in name and "probe" not in name:
                parameter.copy_(noise * (1.5 / parameter[0].numel() ** 0.5))
            elif "norm" in name.lower() or ".ln_" in name:
                shift = 1.0 if name.endswith("weight") else 0.0
                parameter.copy_(shift + 0.3 * noise)
            else:
                parameter.copy_(0.5 * noise)
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


def tensors(model):
    """The state dict as NumPy."""
    return {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
