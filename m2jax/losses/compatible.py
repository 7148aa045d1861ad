# SPDX-License-Identifier: Apache-2.0
"""Losses that keep a new embedding model comparable with an old one whose vectors are stored.

``boundary`` is AdvBCT's (Pan et al. 2023, arXiv 2305.19812); the others are what it is compared
with: BCT (Shen et al. 2020), UniBCT (Zhang et al. 2022), Hot-refresh (Zhang et al. 2022), LCE (Meng
et al. 2021). Formulas follow the code that AdvBCT's authors publish for all of them.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from m2jax.losses.adversarial import cross_entropy
from m2jax.losses.margins import MARGIN, SCALE, arcface

TINY = 1e-12


class OldClasses(NamedTuple):
    """What is known of the old model's classes, which are the first ones of the new model's."""

    centres: Float[Array, "old dim"]  # means of unit features; not of unit length themselves
    radii: Float[Array, " old"]  # largest distance from the centre, outliers left out
    known: Bool[Array, " old"]  # classes with more than one image: the others bound nothing


def unit(x: Float[Array, "... dim"]) -> Float[Array, "... dim"]:
    """Rows of unit length."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), TINY)


class Boundary(NamedTuple):
    """AdvBCT's boundary loss and what it was made of."""

    loss: Float[Array, ""]
    violations: Int[Array, ""]  # rows outside the boundary of their class
    elastic: Float[Array, " classes"]  # by how much each class's radius was moved towards tau


def elastic_boundary(
    weights: Float[Array, " classes"],
    radii: Float[Array, " classes"],
    present: Bool[Array, " classes"],
    tau: float,
) -> tuple[Float[Array, " classes"], Float[Array, " classes"]]:
    """Radii moved towards ``tau`` by |r - tau| sigmoid(w), for classes that are present.

    Returns:
        (moved radii, by how much).
    """
    elastic = jnp.where(present, jnp.abs(radii - tau), 0.0) * jax.nn.sigmoid(weights)
    return jnp.where(radii < tau, radii + elastic, radii - elastic), elastic


def boundary(
    features: Float[Array, "batch dim"],
    labels: Int[Array, " batch"],
    weights: Float[Array, " classes"],
    old: OldClasses,
    *,
    tau: float,
) -> Boundary:
    """Point-to-centre distances beyond elastic boundaries, mean over the rows that violate them.

    A gradient reaches the weights only where a boundary is violated, and always widens it.

    Args:
        features: of the new model, of any length.
        labels: classes of the new model.
        weights: of the elastic boundary, one per class of the new model.
        old: statistics of the old model.
        tau: where radii move to: 1 in the published setting, 0.5 its code's default.
    """
    radii, bound, centres = of_new_classes(old, len(weights))
    has_statistics = jnp.arange(len(weights)) < len(old.radii)
    present = jnp.zeros(len(weights), bool).at[labels].set(True) & has_statistics
    radii, elastic = elastic_boundary(weights, radii, present, tau)
    gap = unit(features) - centres[labels]
    distance = jnp.sqrt(jnp.maximum(jnp.square(gap).sum(-1), TINY))
    beyond = jnp.where(bound[labels], distance - radii[labels], 0.0)
    violated = beyond > 0
    count = violated.sum()
    loss = jnp.where(violated, beyond, 0.0).sum() / jnp.maximum(count, 1)
    return Boundary(loss, count, elastic)


def of_new_classes(
    old: OldClasses, classes: int
) -> tuple[Float[Array, " classes"], Bool[Array, " classes"], Float[Array, "classes dim"]]:
    """Radii, which classes are bound, and centres, for all classes of the new model."""
    more = classes - len(old.radii)
    radii = jnp.pad(jnp.asarray(old.radii, jnp.float32), (0, more))
    centres = jnp.pad(jnp.asarray(old.centres, jnp.float32), ((0, more), (0, 0)))
    return radii, jnp.pad(jnp.asarray(old.known), (0, more)), centres


def bct(
    features: Float[Array, "batch dim"],
    labels: Int[Array, " batch"],
    old_classifier: Float[Array, "dim old"],
) -> Float[Array, ""]:
    """BCT: the old model's frozen classifier on the new features, on rows of classes it knows."""
    known = labels < old_classifier.shape[1]
    log_p = jax.nn.log_softmax(features @ jax.lax.stop_gradient(old_classifier), axis=-1)
    taken = jnp.take_along_axis(log_p, jnp.where(known, labels, 0)[:, None], axis=-1)[:, 0]
    return -jnp.where(known, taken, 0.0).sum() / jnp.maximum(known.sum(), 1)


def unibct(
    features: Float[Array, "batch dim"],
    labels: Int[Array, " batch"],
    centres: Float[Array, "classes dim"],
    *,
    scale: float = SCALE,
    margin: float = MARGIN,
) -> Float[Array, ""]:
    """UniBCT's core: ArcFace against the old model's centres of all classes as fixed prototypes."""
    cosines = unit(features) @ unit(jax.lax.stop_gradient(centres)).T
    return cross_entropy(arcface(cosines, labels, scale=scale, margin=margin), labels)


def hot_refresh(
    features: Float[Array, "batch dim"],
    old: Float[Array, "batch dim"],
    labels: Int[Array, " batch"],
    *,
    temperature: float = 0.01,
    hardest: int = -1,
    among_new: bool = True,
) -> Float[Array, ""]:
    """InfoNCE with a row's own old feature as the positive and other classes' rows as negatives.

    Args:
        features: of the new model.
        old: of the old model for the same images; constants.
        labels: rows of one class are no negatives of each other.
        temperature: of the cosines.
        hardest: only so many negatives of each kind; all if not positive.
        among_new: negatives are other rows' old features and, with this, their new ones too
            (Hot-refresh); without it the loss is the plain contrast with the old model.
    """
    new, old = unit(features), unit(jax.lax.stop_gradient(old))
    same = labels[:, None] == labels[None]

    def negatives(rows: jax.Array) -> jax.Array:
        cosines = jnp.where(same, -1e9, new @ rows.T)
        return jax.lax.top_k(cosines, min(hardest, len(rows)))[0] if hardest > 0 else cosines

    columns = [(new * old).sum(-1, keepdims=True), negatives(old)]
    if among_new:  # the published code gathers these rows, which lets no gradient through
        columns.append(negatives(jax.lax.stop_gradient(new)))
    logits = jnp.concatenate(columns, axis=1) / temperature
    return cross_entropy(logits, jnp.zeros(len(logits), jnp.int32))


class Lce(NamedTuple):
    """The two parts of LCE."""

    boundary: Float[Array, ""]
    alignment: Float[Array, ""]


def lce(
    features: Float[Array, "batch dim"],
    centres: Float[Array, "batch dim"],
    angles: Float[Array, " batch"],
    eligible: Bool[Array, " batch"],
    classifier: Float[Array, "batch dim"],
) -> Lce:
    """LCE: features stay within the old class's angle; classifier rows align with old centres.

    Args:
        features: of the new model.
        centres: the old centre of each row's class.
        angles: the largest angle (radians) of the old class to its centre.
        eligible: rows whose class the old model knows; the others count in neither mean.
        classifier: the new classifier's row of each row's class.
    """
    middle = unit(centres)
    bound = 1 - jnp.finfo(features.dtype).eps
    angle = jnp.arccos(jnp.clip((unit(features) * middle).sum(-1), -bound, bound))
    count = jnp.maximum(eligible.sum(), 1)

    def mean(x: jax.Array) -> jax.Array:
        return jnp.where(eligible, x, 0.0).sum() / count

    apart = 1 - (middle * unit(classifier)).sum(-1)
    return Lce(mean(jax.nn.relu(angle - angles)), mean(apart))
