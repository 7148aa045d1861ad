# SPDX-License-Identifier: Apache-2.0
"""Frozen features of texts and images, with or without their length.

TAI-Adapter's journal abstract says that the length of pretrained features helps, against making
them unit rows; so both are here. An M2-Encoder gives them before its last division; models of the
CLIP family give unit rows alone.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float32

from m2jax.bundle import Bundle
from m2jax.config import UserError
from m2jax.eval import features as unit_features
from m2jax.eval.emoji import Encoder, batched
from m2jax.eval.features import Views
from m2jax.eval.sets.records import Images
from m2jax.models import params as params_lib
from m2jax.models.params import Params

SMALL = 2**16  # entries of the parameters whose values tell one model from another


def has_length(model: Encoder) -> bool:
    """Whether features of a model can be had with their length."""
    return isinstance(model, Bundle) and model.patch_grid > 0


def texts(
    model: Encoder, sentences: Sequence[str], *, length: bool, batch: int = 256
) -> Float32[np.ndarray, "texts dim"]:
    """Features of texts; equal batches, so one shape is compiled.

    Args:
        model: a bundle, or anything with its methods.
        sentences: the texts.
        length: keep the features' length; otherwise unit rows.
        batch: texts at once.

    Raises:
        UserError: a model that gives unit rows alone was asked for more.
    """
    ids, mask = model.tokenize(sentences)
    if not length:
        return _run(lambda i, j: model.encode_text(ids[i:j], mask[i:j]), len(ids), batch)
    bundle = _with_length(model)
    return _run(
        lambda i, j: _long_text(bundle.graph, bundle.params, ids[i:j], mask[i:j]), len(ids), batch
    )


def images(
    model: Encoder,
    pictures: Images,
    *,
    length: bool,
    batch: int = 64,
    show: bool = False,
    views: Views = lambda image: [image],
) -> Float32[np.ndarray, "rows dim"]:
    """Features of images, as ``texts``, and of ``views`` as ``eval.features.image_features``."""
    encoder = _LongImages(_with_length(model)) if length else model
    return unit_features.image_features(encoder, pictures, batch=batch, show=show, views=views)


def fingerprint(model: Bundle) -> str:
    """Tells models apart: an adapter of one fits no other.

    Made of every parameter's name and shape and the values of the small ones, so that a model of
    ten billion parameters need not be read.
    """
    digest = hashlib.sha256()
    for name, leaf in params_lib.flatten(model.params).items():
        digest.update(f"{name} {leaf.shape} {leaf.dtype}\n".encode())
        if leaf.size <= SMALL:
            digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()[:16]


class _LongImages:
    """A bundle whose image features keep their length."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self.preprocess = bundle.preprocess
        self.tokenize = bundle.tokenize
        self.encode_text = bundle.encode_text

    def encode_image(self, pixels: np.ndarray) -> jax.Array:
        """Rows of any length."""
        return _long_image(self._bundle.graph, self._bundle.params, jnp.asarray(pixels))


def _with_length(model: Encoder) -> Bundle:
    if not isinstance(model, Bundle) or not has_length(model):
        raise UserError("normalize=none: this model's features are unit rows: use l2")
    return model


def _run(encode: Callable[[int, int], jax.Array], total: int, batch: int) -> np.ndarray:
    found = np.asarray(batched(encode, total, batch), np.float32)
    if not np.isfinite(found).all():
        raise UserError("labels: features are not numbers: the model is broken")
    return found


@functools.partial(jax.jit, static_argnums=0)
def _long_text(graph: nnx.GraphDef, params: Params, ids: jax.Array, mask: jax.Array) -> jax.Array:
    model = params_lib.bind(graph, params)
    return model.text_vl_head(model.encode_text(ids, mask).vl.tokens[:, 0])


@functools.partial(jax.jit, static_argnums=0)
def _long_image(graph: nnx.GraphDef, params: Params, pixels: jax.Array) -> jax.Array:
    model = params_lib.bind(graph, params)
    return model.image_vl_head(model.encode_image(pixels).vl.tokens[:, 0])
