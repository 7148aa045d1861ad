# SPDX-License-Identifier: Apache-2.0
"""From the logits of images to one class per observation (the snake contest's last steps).

Views of an image are averaged, logits adjusted for the classes' shares, classes never seen at the
place struck out, and the images of one observation merged. Order and details are those of the
public code of 2207.11637; one of its faults is mended and said so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from m2jax.config import UserError

Merge = Literal["best", "vote", "mean"]
UNKNOWN = -1  # a place that training never had


class Observations(NamedTuple):
    """One row per observation, in ascending order of its id."""

    ids: np.ndarray
    classes: Int[np.ndarray, " observations"]
    scores: Float[np.ndarray, " observations"]


def probabilities(
    logits: Float[np.ndarray, "images classes"], adjustment: Float[np.ndarray, " classes"] | float
) -> Float[np.ndarray, "images classes"]:
    """softmax(z - adjustment); the adjustment is tau log pi, or 0 for a model trained with one."""
    z = logits.astype(np.float64) - adjustment
    z = np.exp(z - z.max(axis=1, keepdims=True))
    return z / z.sum(axis=1, keepdims=True)


def places_of(
    places: Int[np.ndarray, " images"], classes: Int[np.ndarray, " images"], count: int, total: int
) -> Bool[np.ndarray, "places classes"]:
    """Which classes training (and validation) images of each place show."""
    found = np.zeros((count, total), np.bool_)
    known = places != UNKNOWN
    found[places[known], classes[known]] = True
    return found


def filtered(
    scores: Float[np.ndarray, "images classes"],
    places: Int[np.ndarray, " images"],
    allowed: Bool[np.ndarray, "places classes"],
    *,
    soft: float = 0.0,
) -> Float[np.ndarray, "images classes"]:
    """Scores with the classes never seen at an image's place struck out; not scaled up again.

    A place that is not known, or one without any class, strikes out nothing. The public code takes
    the lowest class and the score of the image before it there.

    Args:
        scores: probabilities.
        places: of each image; ``UNKNOWN`` where training never had it.
        allowed: of ``places_of``.
        soft: what is left of a struck-out class; 0 is the published hard filter.
    """
    if places.max(initial=UNKNOWN) >= len(allowed):
        raise ValueError(f"place {places.max()} of {len(allowed)}")
    table = np.concatenate([allowed, np.ones((1, allowed.shape[1]), np.bool_)])  # [-1]: unknown
    keep = table[places]
    keep = keep | ~keep.any(axis=1, keepdims=True)
    return np.where(keep, scores, soft * scores)


def merged(
    scores: Float[np.ndarray, "images classes"], observations: Sequence[object], how: Merge = "best"
) -> Observations:
    """One class for the images of each observation.

    Args:
        scores: of the images, filtered.
        observations: id of each image's observation.
        how: ``best`` the class of the image with the highest score (published); ``vote`` the most
            frequent class, of equal ones that of the highest score; ``mean`` of the mean score
            over images.

    Raises:
        UserError: an image has no observation id.
    """
    ids = np.asarray(observations)
    for row, each in enumerate(observations):
        if each is None or each == "" or each != each:
            raise UserError(f"image {row + 1}: has no observation id: give it one of its own")
    unique, group = np.unique(ids, return_inverse=True)
    classes, best = scores.argmax(axis=1), scores.max(axis=1)
    if how == "mean":
        sums = np.zeros((len(unique), scores.shape[1]))
        np.add.at(sums, group, scores)
        means = sums / np.bincount(group)[:, None]
        return Observations(unique, means.argmax(axis=1), means.max(axis=1))
    weight = best.copy()
    if how == "vote":
        votes = np.zeros((len(unique), scores.shape[1]))
        np.add.at(votes, (group, classes), 1)
        weight += votes[group, classes] * (1 + best.max())  # votes count before any score
    elif how != "best":
        raise UserError(f"merge={how!r}: use one of best, vote, mean")
    order = np.lexsort((-weight, group))  # stable: of equal ones the first image
    first = order[np.searchsorted(group[order], np.arange(len(unique)))]
    return Observations(unique, classes[first], best[first])


def ensembled(
    scores: Sequence[Float[np.ndarray, "images classes"]], weights: Sequence[float] = ()
) -> Float[np.ndarray, "images classes"]:
    """Weighted mean of several models' scores, of logits or of probabilities, not of both.

    Raises:
        UserError: weights that ``weights_of`` refuses, or shapes that differ.
    """
    weights = weights_of(weights, len(scores))
    if len({each.shape for each in scores}) > 1:
        raise UserError("ensemble: models of other images or classes: predict the same with all")
    total = sum(w * s for w, s in zip(weights, scores, strict=True))
    return np.asarray(total) / sum(weights)


def weights_of(weights: Sequence[float], models: int) -> list[float]:
    """The weights of so many models; all equal where none are given.

    Raises:
        UserError: they are not one per model, one is below 0, or all are 0.
    """
    found = list(weights) or [1.0] * models
    if not models or len(found) != models:
        raise UserError(f"ensemble: {len(found)} weights for {models} models: give one each")
    if not (min(found) >= 0 and 0 < sum(found) < np.inf):
        raise UserError(f"ensemble: weights {found}: give numbers not below 0, one above it")
    return found
