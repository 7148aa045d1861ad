# SPDX-License-Identifier: Apache-2.0
"""Masked modelling: which patches or words, what they are compared with, and the loss on them.

Attentive masking (SyCoCa) ranks an image's patches by how well each fits its text. The paper's
equations were not to be had: direction, ratio and score are settings here, and the defaults ours.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

NORM_EPS = 1e-6  # of a patch's variance (He et al. 2022, "Masked autoencoders", section 3)
CHOICES = ("high", "low", "random")  # which patches a selection takes


def relevance(
    patches: Float[Array, "batch patches dim"], text: Float[Array, "batch dim"]
) -> Float[Array, "batch patches"]:
    """How well each patch fits the text: the cosine of their unit features. No gradient."""
    return lax.stop_gradient(jnp.einsum("bpd,bd->bp", patches, text))


def chosen(
    scores: Float[Array, "batch patches"], ratio: float, which: str, rng: jax.Array
) -> Int[Array, "batch count"]:
    """Indices of ``round(ratio * patches)`` patches of each image, at least one, in order.

    Args:
        scores: of ``relevance``.
        ratio: share of the patches that are taken.
        which: ``high`` the best scores, ``low`` the worst, ``random`` whatever they are.
        rng: for ``random``.

    Raises:
        ValueError: an unknown ``which``.
    """
    if which not in CHOICES:
        raise ValueError(f"which={which!r}: use one of {', '.join(CHOICES)}")
    count = max(1, round(ratio * scores.shape[1]))
    if which == "random":
        scores = jax.random.uniform(rng, scores.shape)
    elif which == "low":
        scores = -scores
    return jnp.sort(lax.top_k(lax.stop_gradient(scores), count)[1], axis=1)


def chosen_words(
    word: Int[Array, "batch length"], ratio: float, rng: jax.Array
) -> Bool[Array, "batch length"]:
    """True at every token of ``round(ratio * words)`` random words of each text, at least one.

    Args:
        word: number of the word that each token belongs to, from 0; -1 at what is no word
            ([CLS], the end, padding), which is never chosen.
        ratio: share of a text's words.
        rng: decides which.
    """
    length = word.shape[1]
    counts = jnp.asarray([0, *(max(1, round(ratio * n)) for n in range(1, length + 1))])
    words = word.max(axis=1) + 1
    order = jnp.where(
        jnp.arange(length) < words[:, None], jax.random.uniform(rng, word.shape), jnp.inf
    )
    rank = jnp.argsort(jnp.argsort(order, axis=1), axis=1)
    taken = rank < counts[words][:, None]
    return jnp.take_along_axis(taken, jnp.maximum(word, 0), axis=1) & (word >= 0)


def as_mask(indices: Int[Array, "batch count"], patches: int) -> Bool[Array, "batch patches"]:
    """True at the indices."""
    return (indices[:, :, None] == jnp.arange(patches)).any(1)


def patch_targets(
    pixels: Float[Array, "batch height width 3"], patch: int
) -> Float[Array, "batch patches values"]:
    """Each patch's pixels, less their mean, over their deviation (He et al. 2022, section 3)."""
    b, h, w, _ = pixels.shape
    x = pixels.reshape(b, h // patch, patch, w // patch, patch, 3).swapaxes(2, 3)
    x = x.reshape(b, -1, patch * patch * 3)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = x - x.mean(-1, keepdims=True)
    return centred * lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + NORM_EPS)


def at_chosen(
    states: Float[Array, "batch patches dim"],
    codes: Int[Array, "batch patches"],
    indices: Int[Array, "batch count"],
) -> tuple[Float[Array, "batch count dim"], Int[Array, "batch count"], Float[Array, "batch count"]]:
    """States, visual tokens and weights (all 1) of the chosen patches: for a cross-entropy."""
    told = jnp.take_along_axis(codes, indices, axis=1)
    taken = jnp.take_along_axis(states, indices[..., None], axis=1)
    return taken, told, jnp.ones(told.shape, jnp.float32)


def masked_pixel_loss(
    predicted: Float[Array, "batch patches values"],
    target: Float[Array, "batch patches values"],
    masked: Bool[Array, "batch patches"],
) -> Float[Array, ""]:
    """Mean squared error over the masked patches alone, in float32 or wider."""
    wide = jnp.promote_types(predicted.dtype, target.dtype)
    error = jnp.square(predicted.astype(wide) - target).mean(-1)
    return jnp.where(masked, error, 0).sum() / jnp.maximum(masked.sum(), 1)
