# SPDX-License-Identifier: Apache-2.0
"""The check of an imported M2-Encoder: the source file's own features against ours.

The probes reach every kind of weight, those that no public forward reads included, so that a
transposed matrix or swapped copies show wherever they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int

from m2jax import config as config_lib
from m2jax.checkpoint.convert import check
from m2jax.checkpoint.convert.m2_reference import Reference, Sizes
from m2jax.config import UserError
from m2jax.data.text import Tokenizer
from m2jax.models import params as params_lib
from m2jax.models.multiway import ALL_B
from m2jax.models.params import Params

TEXTS = ("皮卡丘", "a photo of a cat", "一张猫的照片, in English too", "")
SCALES = ("logit_scale", "logit_vl_scale")
PICTURES = ("gradient", "stripes", "noise")

Features = dict[str, np.ndarray]


class Probes(NamedTuple):
    """What is encoded on both sides."""

    pixels: Float[np.ndarray, "pictures side side 3"]
    masked: Bool[np.ndarray, "pictures patches"]
    ids: Int[np.ndarray, "texts length"]
    mask: Bool[np.ndarray, "texts length"]


def probes(cfg: config_lib.Model, tokenizer: Tokenizer | None) -> Probes:
    """The built-in set: three generated pictures, random ids of several lengths, a few texts."""
    rng = np.random.default_rng(0)
    side, length = cfg.image_size, cfg.max_text_len
    ramp = np.linspace(0, 1, side, dtype=np.float32)
    gradient = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], 1 - ramp[:, None]), -1)
    stripes = np.broadcast_to(
        (np.arange(side) // 5 % 2).astype(np.float32)[:, None, None], gradient.shape
    )
    noise = rng.uniform(size=gradient.shape).astype(np.float32)
    masked = rng.uniform(size=(len(PICTURES), (side // cfg.patch_size) ** 2)) < 0.3
    ids = rng.integers(0, cfg.vocab_size, (3, length)).astype(np.int32)
    mask = np.arange(length) < np.array([[length], [max(1, length // 2)], [2]])
    if tokenizer is not None:
        tokens = tokenizer(TEXTS)
        ids = np.concatenate([ids, tokens.ids])
        mask = np.concatenate([mask, tokens.mask])
    return Probes(np.stack([gradient, stripes, noise]), masked, ids, mask)


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
    if any(np.promote_types(t.dtype, dtype) != dtype for t in tensors.values()):
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
        try:
            found[name] = compute()
        except KeyError as error:
            if "unused" not in name:
                raise UserError(
                    f"{error.args[0]}: the check needs it, and it was allowed to be missing: "
                    "add --no-check"
                ) from None
    return found


def _ours(cfg: config_lib.Model, params: Params, given: Probes) -> Features:
    """The features of the imported parameters, in float32."""
    graph = params_lib.abstract(cfg).graph
    with jax.default_matmul_precision("highest"):
        features = _forward(graph, params, *map(jnp.asarray, given))
    return jax.tree.map(np.asarray, features)


@functools.partial(jax.jit, static_argnums=0)
def _forward(
    graph: nnx.GraphDef,
    params: Params,
    pixels: jax.Array,
    patches: jax.Array,
    ids: jax.Array,
    mask: jax.Array,
) -> dict[str, jax.Array]:
    model = params_lib.bind(graph, params)
    image = model.encode_image(pixels)
    masked = model.encode_image(pixels, masked=patches)
    text = model.encode_text(ids, mask)
    vl_b = model.vl(text.backbone.tokens, split=ALL_B, token_mask=mask).tokens[:, 0]
    head = model.text_vl_head(vl_b)
    return {
        "image": image.features,
        "image, backbone head": image.backbone_features,
        "text": text.features,
        "text, backbone head": text.backbone_features,
        "image, some patches masked": masked.backbone_features,
        "text, through the unused vl weights": head / jnp.linalg.norm(head, axis=-1, keepdims=True),
        "text, through the unused pooler": jnp.tanh(
            model.pooler(model.norm(text.backbone.tokens[:, 0]))
        ),
        "scales": jnp.stack([model.logit_scale[...], model.logit_vl_scale[...]])[None],
    }
