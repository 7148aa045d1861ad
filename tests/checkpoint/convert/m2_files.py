# SPDX-License-Identifier: Apache-2.0
"""A small M2-Encoder under its official names, every number of it random."""

import json

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from m2jax.checkpoint.convert import m2_arch, m2_layout

KEYS = {
    "encoder_embed_dim": 16,
    "encoder_attention_heads": 2,
    "out_embed_dim": 8,
    "encoder_layers": 2,
    "beit3_vl_layers": 1,
    "image_size": 16,
    "patch_size": 4,
    "vocab_size": 100,
    "max_text_len": 6,
}
MODEL = m2_arch.from_official(KEYS, "test").model
LAYER = "backbone.encoder.layers.1.ffn.B.fc1.weight"


def tensors(dtype="float32", seed=0, model=MODEL):
    """Random tensors: matrices that keep the scale, norms about 1, nothing that is zero."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, shape in m2_layout.shapes(model).items():
        array = rng.normal(size=shape)
        if "norm" in name or "_ln" in name:
            array = array * 0.3 + name.endswith("weight")
        elif len(shape) == 2 and "embed" not in name:
            array = array / np.sqrt(shape[1])
        found[name] = np.asarray(array).astype(jnp.dtype(dtype))
    return found


def release(folder, official, keys=KEYS):
    """A folder with the weights and the config; returns the two files."""
    folder.mkdir(exist_ok=True)
    arch, weights = folder / "Encoder_tiny.json", folder / "m2_encoder.safetensors"
    arch.write_text(json.dumps(keys))
    save_file(official, weights)
    return weights, arch
