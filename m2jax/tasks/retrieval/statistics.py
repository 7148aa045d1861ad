# SPDX-License-Identifier: Apache-2.0
"""What AdvBCT must know of an old model's classes, streamed over its stored features.

Two passes over batches: sums and counts first, then distances to the centres they give. Memory
beside a batch: one centre per class, two numbers per image.

Source: the code that AdvBCT's authors publish (arXiv 2305.19812). Quartiles are taken by index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from m2jax.config import UserError
from m2jax.losses.compatible import OldClasses

Batches = Iterable[tuple[Float[np.ndarray, "batch dim"], Int[np.ndarray, " batch"]]]
FENCE = 1.5  # interquartile ranges beyond the quartiles; what lies farther is an outlier
FEW = 4  # images below which nothing is an outlier


class Sums(NamedTuple):
    """Sums of unit features of each class."""

    total: Float[np.ndarray, "classes dim"]
    images: Int[np.ndarray, " classes"]

    @property
    def centres(self) -> Float[np.ndarray, "classes dim"]:
        """Means of unit features, not of unit length; zeros for classes without images."""
        return self.total / np.maximum(self.images, 1)[:, None]


class Apart(NamedTuple):
    """How far each image lies from its class's centre."""

    labels: Int[np.ndarray, " images"]
    radii: Float[np.ndarray, " images"]  # Euclidean, of unit features
    angles: Float[np.ndarray, " images"]  # to the centre's direction, radians


class ClassStatistics(NamedTuple):
    """Of each class of the old model; the radii and angles kept, rising."""

    centres: Float[np.ndarray, "classes dim"]
    radii: list[Float[np.ndarray, " kept"]]
    angles: list[Float[np.ndarray, " kept"]]

    @property
    def radius_max(self) -> Float[np.ndarray, " classes"]:
        """The largest radius kept; 0 for classes without images."""
        return np.array([each[-1] if len(each) else 0.0 for each in self.radii])

    @property
    def angle_max(self) -> Float[np.ndarray, " classes"]:
        """The largest angle kept, radians; 0 for classes without images."""
        return np.array([each[-1] if len(each) else 0.0 for each in self.angles])

    @property
    def counts(self) -> Int[np.ndarray, " classes"]:
        """Radii kept of each class."""
        return np.array([len(each) for each in self.radii])

    def old_classes(self) -> OldClasses:
        """What the losses take; classes of one image bound nothing."""
        return OldClasses(
            self.centres.astype(np.float32),  # type: ignore[arg-type]
            self.radius_max.astype(np.float32),  # type: ignore[arg-type]
            self.counts > 1,  # type: ignore[arg-type]
        )


def class_statistics(batches: Callable[[], Batches], classes: int) -> ClassStatistics:
    """Statistics of features that are gone through twice.

    Args:
        batches: starts a pass over (features, labels); both passes must give the same rows.
        classes: number of classes.

    Raises:
        UserError: features that are no numbers, labels out of range, or passes that differ.
    """
    sums = total_of(batches(), classes)
    return finish(sums, distances(batches(), sums.centres))


def total_of(batches: Batches, classes: int) -> Sums:
    """The first pass."""
    total, count = None, np.zeros(classes, np.int64)
    for features, labels in batches:
        _check(features, labels, classes)
        if total is None:
            total = np.zeros((classes, features.shape[1]))
        np.add.at(total, labels, _unit(features))
        count += np.bincount(labels, minlength=classes)
    if total is None:
        raise UserError("class statistics: no features: name the old model's features")
    return Sums(total, count)


def distances(batches: Batches, centres: Float[np.ndarray, "classes dim"]) -> Apart:
    """The second pass."""
    directions = _unit(centres)
    labels, radii, angles = [], [], []
    for features, named in batches:
        unit = _unit(features)
        labels.append(np.asarray(named))
        radii.append(np.linalg.norm(unit - centres[named], axis=1))
        angles.append(np.arccos(np.clip((unit * directions[named]).sum(1), -1, 1)))
    return Apart(*(np.concatenate(each) for each in (labels, radii, angles)))


def finish(sums: Sums, apart: Apart) -> ClassStatistics:
    """Sorts distances by class and leaves outliers out.

    Raises:
        UserError: the passes saw different images.
    """
    classes = len(sums.images)
    if not np.array_equal(np.bincount(apart.labels, minlength=classes), sums.images):
        raise UserError(
            "class statistics: the two passes saw different images: do not change the features "
            "while they are read"
        )
    order = np.argsort(apart.labels, kind="stable")
    ends = np.cumsum(sums.images)[:-1]
    radii, angles = (
        [without_outliers(np.sort(each)) for each in np.split(values[order], ends)]
        for values in (apart.radii, apart.angles)
    )
    return ClassStatistics(sums.centres, radii, angles)


def without_outliers(rising: Float[np.ndarray, " images"]) -> Float[np.ndarray, " kept"]:
    """Values within 1.5 interquartile ranges of the quartiles at [n // 4] and [3 n // 4]."""
    n = len(rising)
    if n < FEW:
        return rising
    low, high = rising[n // 4], rising[3 * n // 4]
    reach = FENCE * (high - low)
    return rising[(rising >= low - reach) & (rising <= high + reach)]


def _unit(x: np.ndarray) -> Float[np.ndarray, "n dim"]:
    wide = np.asarray(x, np.float64)
    return wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)


def _check(features: np.ndarray, labels: np.ndarray, classes: int) -> None:
    if not np.isfinite(features).all():
        raise UserError("class statistics: a feature is not a number: the old model is broken")
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise UserError(
            f"class statistics: labels {labels.min()}..{labels.max()} do not fit {classes} "
            "classes: number them from 0"
        )
