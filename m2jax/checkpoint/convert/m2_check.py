# SPDX-License-Identifier: Apache-2.0
"""The check of an imported M2-Encoder: the source file's own features against ours.

The probes reach every kind of weight, those that no public forward reads included, so that a
transposed matrix or swapped copies show wherever they are.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from m2jax import config as config_lib
from m2jax.checkpoint.convert import check, layerwise
from m2jax.checkpoint.convert.m2_reference import Reference, Sizes
from m2jax.data.text import Tokenizer
from m2jax.models import params as params_lib
from m2jax.models.multiway import ALL_B
from m2jax.models.params import Params

SCALES = ("logit_scale", "logit_vl_scale")

Features = dict[str, np.ndarray]


class Probes(NamedTuple):
    """What is encoded on both sides."""

    pixels: Float[np.ndarray, "pictures side side 3"]
    masked: Bool[np.ndarray, "pictures patches"]
    ids: Int[np.ndarray, "texts length"]
    mask: Bool[np.ndarray, "texts length"]


def probes(cfg: config_lib.Model, tokenizer: Tokenizer | None) -> Probes:
    """The built-in set: three generated pictures, random ids of several lengths, a few texts."""
    pixels = np.stack([*check.pictures(cfg.image_size).values()])
    patches = (len(pixels), (cfg.image_size // cfg.patch_size) ** 2)
    masked = np.random.default_rng(0).uniform(size=patches) < 0.3
    return Probes(pixels, masked, *check.texts(cfg.vocab_size, cfg.max_text_len, tokenizer))


def run(
    tensors: Mapping[str, np.ndarray],
    cfg: config_lib.Model,
    params: Params,
    tokenizer: Tokenizer | None,
) -> list[check.Row]:
    """Encodes the probes with both.

    Where parameters were rounded to a narrower type, the reference rounds the file's numbers alike,
    and further rows tell what the rounding itself costs.

    Args:
        tensors: of the source file, by official name.
        cfg: the resolved model.
        params: what was made of the tensors.
        tokenizer: adds texts to the probes.

    Raises:
        UserError: a tensor that features need is missing.
    """
    given = probes(cfg, tokenizer)
    after = _ours(cfg, params, given)
    dtype = np.dtype(cfg.param_dtype)
    rows = check.compare(_before(tensors, cfg, given, dtype), after)
    held = {tensor.dtype.newbyteorder("=") for tensor in tensors.values()}
    if any(jnp.promote_types(kind, dtype) != dtype for kind in held):  # NumPy knows no bfloat16
        source = _before(tensors, cfg, given, None)
        seen = {f"{name}, rounding included": source[name] for name in ("image", "text")}
        ours = {f"{name}, rounding included": after[name] for name in ("image", "text")}
        rows += check.compare(seen, ours, limit=np.inf)
    return rows


def _before(
    tensors: Mapping[str, np.ndarray], cfg: config_lib.Model, given: Probes, dtype: np.dtype | None
) -> Features:
    """The reference's features; of the file's numbers rounded to ``dtype``, if given."""

    def rounded(array: np.ndarray) -> np.ndarray:
        return (array if dtype is None else array.astype(dtype)).astype(np.float64)

    sizes = Sizes(cfg.heads, cfg.backbone_layers, cfg.vl_layers, cfg.patch_size)
    model = Reference(lambda name: rounded(tensors[name]), sizes)

    def embed(ids: np.ndarray) -> np.ndarray:
        return rounded(tensors["backbone.text_embed.weight"][ids])

    def image(masked: np.ndarray | None) -> np.ndarray:
        return model.backbone(model.image_tokens(given.pixels, masked), "A")

    @functools.cache
    def plain() -> np.ndarray:
        return image(None)

    @functools.cache
    def text() -> np.ndarray:
        return model.backbone(model.text_tokens(embed, given.ids), "B", given.mask)

    def vl_text(way: str) -> np.ndarray:
        return model.head("itc_vl_text_proj", model.vl(text(), way, given.mask))

    rows: dict[str, Callable[[], np.ndarray]] = {
        "image": lambda: model.head("itc_vl_image_proj", model.vl(plain(), "A")),
        "image, backbone head": lambda: model.head("itc_image_proj", plain()),
        "text": lambda: vl_text("A"),
        "text, backbone head": lambda: model.head("itc_text_proj", text()),
        "image, some patches masked": lambda: model.head("itc_image_proj", image(given.masked)),
        "text, through the unused vl weights": lambda: vl_text("B"),
        "text, through the unused pooler": lambda: model.pooled(text()),
        "scales": lambda: np.array([[model.scale(name) for name in SCALES]]),
    }
    return _existing(rows)


def _existing(rows: Mapping[str, Callable[[], np.ndarray]]) -> Features:
    """The features whose tensors are there; those a user sees must be."""
    found = {}
    for name, compute in rows.items():
        with contextlib.suppress(KeyError) if "unused" in name else check.every_tensor_there():
            found[name] = compute()
    return found


def _ours(cfg: config_lib.Model, params: Params, given: Probes) -> Features:
    """The features of the imported parameters, in float32, one layer in memory at a time."""
    pixels, masked, ids, mask = map(jnp.asarray, given)
    with jax.default_matmul_precision("highest"):
        model = layerwise.bind(params_lib.abstract(cfg).graph, params)
        image, text = model.encode_image(pixels), model.encode_text(ids, mask)
        vl_b = model.vl(text.backbone.tokens, split=ALL_B, token_mask=mask).tokens[:, 0]
        head = model.text_vl_head(vl_b)
        first = model.norm(text.backbone.tokens[:, 0])
        features = {
            "image": image.features,
            "image, backbone head": image.backbone_features,
            "text": text.features,
            "text, backbone head": text.backbone_features,
            "image, some patches masked": model.encode_image(
                pixels, masked=masked
            ).backbone_features,
            "text, through the unused vl weights": head
            / jnp.linalg.norm(head, axis=-1, keepdims=True),
            "text, through the unused pooler": jnp.tanh(model.pooler(first)),
            "scales": jnp.stack([model.logit_scale[...], model.logit_vl_scale[...]])[None],
        }
    return jax.tree.map(np.asarray, features)
