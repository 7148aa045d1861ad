# SPDX-License-Identifier: Apache-2.0
"""Boxes of one class, found at places of a picture without anchors: who is to find what, and loss.

A box is (left, top, right, bottom). Assignment is task-aligned: places whose score and box both
fit a true box best are to find it (TOOD, Feng et al., ICCV 2021; its powers are YOLOv8's). Boxes
are compared by the generalised overlap (Rezatofighi et al., CVPR 2019).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

ALIGN_SCORE, ALIGN_OVERLAP = 0.5, 6.0  # powers of score and overlap in the alignment
POSITIVES = 10  # places that are to find one box
NEAR = 1.5  # strides from its centre within which a place may find a box that it lies outside of
EPS = 1e-9


class Terms(NamedTuple):
    """Means over the true boxes of a batch."""

    box: Float[Array, ""]  # 1 - generalised overlap
    score: Float[Array, ""]  # binary cross-entropy


class Assigned(NamedTuple):
    """What each place is to say."""

    target: Float[Array, " places"]  # the score; 0: nothing here
    box: Int[Array, " places"]  # which true box


def overlaps(
    one: Float[Array, "*batch 4"], other: Float[Array, "*batch 4"]
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
    """Intersection over union, and the generalised one: less the empty share of the hull."""
    low, high = jnp.maximum(one[..., :2], other[..., :2]), jnp.minimum(one[..., 2:], other[..., 2:])
    shared = jnp.maximum(high - low, 0).prod(axis=-1)
    areas = [jnp.maximum(x[..., 2:] - x[..., :2], 0).prod(axis=-1) for x in (one, other)]
    union = areas[0] + areas[1] - shared
    outer = jnp.maximum(one[..., 2:], other[..., 2:]) - jnp.minimum(one[..., :2], other[..., :2])
    hull = outer.prod(axis=-1)
    iou = shared / (union + EPS)
    return iou, iou - (hull - union) / (hull + EPS)


def assign(
    scores: Float[Array, " places"],
    boxes: Float[Array, "places 4"],
    truth: Float[Array, "boxes 4"],
    real: Bool[Array, " boxes"],
    centres: Float[Array, "places 2"],
    strides: Float[Array, " places"],
) -> Assigned:
    """Gives each true box its best places, and each place one box at most.

    Args:
        scores: probabilities of the places.
        boxes: found by them.
        truth: boxes; rows that are not ``real`` are padding.
        real: which are.
        centres: of the places (x, y).
        strides: pixels between places of one kind.
    """
    overlap, _ = overlaps(boxes[:, None], truth[None])  # [places, boxes]
    inside = (centres[:, None] > truth[None, :, :2]) & (centres[:, None] < truth[None, :, 2:])
    middle = (truth[:, :2] + truth[:, 2:]) / 2
    near = jnp.abs(centres[:, None] - middle[None]) < NEAR * strides[:, None, None]
    may = (inside.all(axis=-1) | near.all(axis=-1)) & real[None]
    alignment = scores[:, None] ** ALIGN_SCORE * overlap**ALIGN_OVERLAP
    rank = jnp.where(may, alignment, -1.0)
    least = jax.lax.top_k(rank.T, min(POSITIVES, len(scores)))[0][:, -1]
    taken = may & (rank >= least[None]) & (alignment > 0)
    # A place that two boxes want finds the one that it already overlaps more.
    box = jnp.where(taken, overlap, -1.0).argmax(axis=1)
    taken &= box[:, None] == jnp.arange(len(truth))[None]
    alignment = jnp.where(taken, alignment, 0.0)
    best = jnp.where(taken, overlap, 0.0).max(axis=0)
    target = alignment / (alignment.max(axis=0) + EPS) * best[None]
    return Assigned(target.sum(axis=1), box)


def loss(
    logits: Float[Array, "batch places"],
    boxes: Float[Array, "batch places 4"],
    truth: Float[Array, "batch boxes 4"],
    real: Bool[Array, "batch boxes"],
    centres: Float[Array, "places 2"],
    strides: Float[Array, " places"],
) -> Terms:
    """The two terms; both are sums over places divided by the sum of target scores, at least 1.

    Args:
        logits: of the places' scores.
        boxes: found by them.
        truth: true boxes, padded to one number.
        real: which rows are no padding.
        centres: of the places (x, y).
        strides: pixels between places of one kind.
    """
    target, which = jax.vmap(assign, (0, 0, 0, 0, None, None))(
        *jax.lax.stop_gradient((jax.nn.sigmoid(logits), boxes)), truth, real, centres, strides
    )
    target = jax.lax.stop_gradient(target)
    own = jnp.take_along_axis(truth, which[..., None], axis=1)
    _, generalised = overlaps(boxes, own)
    count = jnp.maximum(target.sum(), 1.0)
    # Cross-entropy with a soft target: log(1 + e^x) - x t.
    score = (jax.nn.softplus(logits) - logits * target).sum() / count
    return Terms((target * (1 - generalised)).sum() / count, score)
