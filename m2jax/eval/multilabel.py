# SPDX-License-Identifier: Apache-2.0
"""Figures of classifiers with many labels or many classes: mAP, CF1, OF1, macro-F1.

Where papers differ in what they call by one name, both forms are here under names of their own.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

POSITIVES = 1e-8  # added to the number of positives, as the released evaluators do
COLUMNS = 256  # classes sorted at once: memory is images x these


class MeanAP(NamedTuple):
    """Shares between 0 and 1."""

    map: float
    per_class: Float[np.ndarray, " classes"]


class F1(NamedTuple):
    """Precision, recall and their harmonic mean, over classes (c) and overall (o)."""

    cp: float
    cr: float
    cf1: float
    op: float
    or_: float
    of1: float


def mean_ap(
    scores: Float[np.ndarray, "images classes"],
    targets: Int[np.ndarray, "images classes"] | Bool[np.ndarray, "images classes"],
) -> MeanAP:
    """The mAP of the multi-label papers (evaluators of ASL and of TaI-DPT).

    AP of a class = sum over its images of precision at their rank / (their number + 1e-8). A class
    without an image has AP 0 and stays in the mean (``zero_shot.multi_label`` leaves it out). Of
    equal scores the wrong ones stand first, so a constant score earns nothing.
    """
    found = np.zeros(scores.shape[1])
    for first in range(0, scores.shape[1], COLUMNS):
        part = scores[:, first : first + COLUMNS].astype(np.float64)
        truth = np.asarray(targets[:, first : first + COLUMNS]) > 0
        order = np.lexsort((truth, -part), axis=0)
        ordered = np.take_along_axis(truth, order, axis=0)
        places = np.arange(1, len(part) + 1)[:, None]
        hits = ordered.cumsum(axis=0)
        total = (ordered * hits / places).sum(axis=0)
        found[first : first + COLUMNS] = total / (truth.sum(axis=0) + POSITIVES)
    return MeanAP(float(found.mean()), found)


def f1(
    predicted: Bool[np.ndarray, "images classes"], targets: Bool[np.ndarray, "images classes"]
) -> F1:
    """CP, CR, CF1 and OP, OR, OF1 (Wang et al. 2016, section 4.2).

    CF1 is the harmonic mean of the mean precision and the mean recall over classes, which is not
    the mean of the classes' F1. A class never predicted has precision 0, one without an image
    recall 0; both stay in the means.
    """
    predicted, targets = predicted.astype(np.bool_), np.asarray(targets) > 0
    right = (predicted & targets).sum(axis=0)
    given, there = predicted.sum(axis=0), targets.sum(axis=0)
    cp, cr = float(_ratio(right, given).mean()), float(_ratio(right, there).mean())
    op, or_ = (float(_ratio(right.sum(), n.sum())) for n in (given, there))
    return F1(cp, cr, _harmonic(cp, cr), op, or_, _harmonic(op, or_))


def top_k(
    scores: Float[np.ndarray, "images classes"], k: int
) -> Bool[np.ndarray, "images classes"]:
    """True at the ``k`` best scores of each image; of equal ones the first classes."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    found = np.zeros(scores.shape, np.bool_)
    np.put_along_axis(found, order, True, axis=1)
    return found


def per_class_f1(
    predicted: Int[np.ndarray, " examples"], truth: Int[np.ndarray, " examples"], classes: int
) -> Float[np.ndarray, " classes"]:
    """2 right / (predicted + there) of each class; 0 where it is neither predicted nor there."""
    right = np.bincount(truth[predicted == truth], minlength=classes)
    both = np.bincount(predicted, minlength=classes) + np.bincount(truth, minlength=classes)
    return _ratio(2 * right, both)


def macro_f1(
    predicted: Int[np.ndarray, " examples"],
    truth: Int[np.ndarray, " examples"],
    classes: int | None = None,
) -> float:
    """Mean over classes of F1.

    Args:
        predicted: class numbers.
        truth: class numbers.
        classes: mean over this many, those without an example as 0; if not given over those that
            are predicted or there (scikit-learn's convention, the higher of the two).
    """
    most = 1 + int(max(predicted.max(initial=-1), truth.max(initial=-1)))
    each = per_class_f1(predicted, truth, max(most, classes or 0))
    if classes is None:
        each = each[np.union1d(predicted, truth)]
    return float(each.mean())


def _ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    return np.divide(top, bottom, out=np.zeros(np.shape(top)), where=np.asarray(bottom) > 0)


def _harmonic(a: float, b: float) -> float:
    return 2 * a * b / (a + b) if a + b else 0.0
