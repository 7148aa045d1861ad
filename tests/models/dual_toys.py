# SPDX-License-Identifier: Apache-2.0
"""One small config of each family, and parameters of which every one differs from its start."""

import dataclasses

import jax
import numpy as np

from m2jax.checkpoint.convert import dual_tensors, place
from m2jax.config_dual import Dual, Text, Vision
from m2jax.models import params as params_lib

_SIZES = {"width": 32, "layers": 3, "heads": 4, "mlp_width": 48}
_VISION = Vision(**_SIZES, image_size=22, patch_size=8)
_TEXT = Text(**_SIZES, vocab_size=60, positions=10)
TOYS = {
    "clip": Dual(vision=_VISION, text=_TEXT, out_dim=24),
    "siglip": Dual(
        family="siglip",
        vision=dataclasses.replace(
            _VISION,
            activation="gelu_tanh",
            eps=1e-6,
            patch_bias=True,
            pre_norm=False,
            pooling="map",
            projection=False,
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
        ),
        text=dataclasses.replace(
            _TEXT, activation="gelu_tanh", eps=1e-6, causal=False, pooling="last", head_bias=True
        ),
        out_dim=32,
        logit_bias=True,
    ),
    "chinese-clip": Dual(
        family="chinese-clip",
        vision=_VISION,
        text=dataclasses.replace(
            _TEXT,
            activation="gelu",
            eps=1e-12,
            causal=False,
            masked=True,
            pooling="first",
            token_types=2,
            post_norm=True,
        ),
        out_dim=24,
    ),
}


def random_params(cfg, seed=0):
    """Random everywhere but in the rows that pad the token table: 0, as an import leaves them."""
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32),
        params_lib.abstract(cfg).params,
    )
    params["text"]["embed"][cfg.text.vocab_size :] = 0
    return params


def inputs(cfg, batch=4):
    """Pixels, ids and mask; texts of different lengths, padded on the right with 0."""
    rng = np.random.default_rng(1)
    size, length = cfg.vision.image_size, cfg.text.positions
    pixels = rng.random((batch, size, size, 3), np.float32)
    ids = rng.integers(3, cfg.text.vocab_size - 2, (batch, length)).astype(np.int32)
    mask = np.arange(length) < np.array([length, 4, 7, 3])[:batch, None]
    ids[~mask] = 0
    return pixels, ids, mask


def placed(tensors, cfg, layout, where="x"):
    """The parameters made of a release's tensors, on one device."""
    model = params_lib.abstract(cfg)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    places = jax.tree.map(lambda _: one, model.params)
    parts = dual_tensors.pieces(tensors, cfg, layout, where)
    return place.place(model, places, parts, fresh=lambda names: {})
