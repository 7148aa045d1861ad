# SPDX-License-Identifier: Apache-2.0
"""Zero-shot classification by prompt ensembles, one label or several; and choosing among texts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import scipy.sparse
from jaxtyping import Bool, Float, Int

from m2jax.config import UserError
from m2jax.eval import features, figures
from m2jax.eval import metrics as metrics_lib
from m2jax.eval.emoji import Encoder
from m2jax.eval.figures import Figure
from m2jax.eval.sets.records import Classes, Question

ROWS = 4096  # pictures whose scores are held at once
AP_DRAWS = 200  # each draw of mAP sorts nothing anew but sums over every picture and class


def classifier(
    model: Encoder, classes: Classes, templates: Sequence[str], *, batch: int
) -> Float[np.ndarray, "classes dim"]:
    """Unit rows: the mean feature of each class over its names and all prompts.

    Args:
        model: whose text encoder is used.
        classes: of each its names.
        templates: with ``{c}`` for the name.
        batch: prompts at once.
    """
    texts = [t.replace("{c}", name) for names in classes for name in names for t in templates]
    unique, rows = features.unique_text_features(model, texts, batch=batch)
    ends = np.cumsum([0] + [len(names) * len(templates) for names in classes])
    means = np.stack([unique[rows[a:b]].mean(axis=0) for a, b in itertools.pairwise(ends)])
    return means / np.linalg.norm(means, axis=1, keepdims=True)


def classification(
    images: Float[np.ndarray, "images dim"],
    weights: Float[np.ndarray, "classes dim"],
    labels: Int[np.ndarray, " images"],
) -> dict[str, Figure]:
    """Top-1, top-5 where there are more classes, and the mean over classes of top-1.

    Ties count against the model. Classes without a picture are left out of the mean.
    """
    first = np.concatenate(
        [
            _ranks(images[i : i + ROWS], weights, labels[i : i + ROWS])
            for i in range(0, len(images), ROWS)
        ]
    )
    found = {f"top{k}": figures.share(first < k) for k in (1, 5) if k < len(weights)}
    if not found:
        raise UserError("zero-shot: one class alone: give at least two")
    found["mean_per_class"] = class_mean(first < 1, labels)
    return found


def _ranks(images: np.ndarray, weights: np.ndarray, labels: np.ndarray) -> np.ndarray:
    right = labels[:, None] == np.arange(len(weights))
    return metrics_lib.first_right(images @ weights.T, right)


def class_mean(right: Bool[np.ndarray, " images"], labels: Int[np.ndarray, " images"]) -> Figure:
    """Mean over classes of the share that is right (balanced accuracy), with its interval."""
    _, number = np.unique(labels, return_inverse=True)
    rows = np.arange(len(labels))
    every = scipy.sparse.csr_array((np.ones(len(labels)), (rows, number)))
    hits = scipy.sparse.csr_array((right.astype(np.float64), (rows, number)))

    def mean(times: np.ndarray) -> np.ndarray:
        drawn = times @ every  # a draw may leave a class out
        shares = np.divide(times @ hits, drawn, out=np.zeros(drawn.shape), where=drawn > 0)
        return shares.sum(axis=-1) / (drawn > 0).sum(axis=-1)

    value = float(mean(np.ones((1, len(labels))))[0])
    return figures.drawn(value, metrics_lib.resampled([len(labels)], mean), len(labels))


def multi_label(
    scores: Float[np.ndarray, "images classes"], shown: Bool[np.ndarray, "images classes"]
) -> dict[str, Figure]:
    """Mean average precision over classes that some picture shows, with its bootstrap interval.

    Raises:
        UserError: no picture shows any class.
    """
    used = shown.any(axis=0)
    if not used.any():
        raise UserError("zero-shot: no picture has a label: check the data set")
    scores, shown = scores[:, used], shown[:, used]
    value = float(average_precision(scores, shown, np.ones((1, len(scores)))).mean())

    def drawn_map(times: np.ndarray) -> np.ndarray:
        return np.nanmean(average_precision(scores, shown, times), axis=-1)

    drawn = metrics_lib.resampled([len(scores)], drawn_map, resamples=AP_DRAWS)
    return {"map": figures.drawn(value, drawn, len(scores))}


def average_precision(
    scores: Float[np.ndarray, "images classes"],
    shown: Bool[np.ndarray, "images classes"],
    times: Float[np.ndarray, "draws images"],
) -> Float[np.ndarray, "draws classes"]:
    """Sum over thresholds of (recall gained) x precision, pictures with one score taken together.

    That is scikit-learn's average precision; a picture drawn twice counts twice. Not a number where
    a draw has no picture of a class.
    """
    found = np.empty((len(times), scores.shape[1]))
    for column in range(scores.shape[1]):
        order = np.argsort(-scores[:, column], kind="stable")
        ordered, truth = scores[order, column], shown[order, column]
        last = np.flatnonzero(np.append(np.diff(ordered) != 0, True))  # of each equal score
        counts = times[:, order]
        seen = counts.cumsum(axis=1)[:, last]
        hits = (counts * truth).cumsum(axis=1)[:, last]
        precision = np.divide(hits, seen, out=np.zeros_like(hits), where=seen > 0)
        gained = np.diff(hits, axis=1, prepend=0)
        with np.errstate(invalid="ignore"):
            found[:, column] = (gained * precision).sum(axis=1) / hits[:, -1]
    return found


def choice(scores: Sequence[np.ndarray], questions: Sequence[Question]) -> dict[str, Figure]:
    """What is earned by taking each question's best text, and what guessing would earn.

    Of equal scores the text that earns least is taken. ``accuracy`` is the mean credit over
    questions. Its examples are pictures: questions about one are no independent ones.
    """
    earned = np.empty(len(questions))
    for row, (values, question) in enumerate(zip(scores, questions, strict=True)):
        if not np.isfinite(values).all():
            raise UserError("evaluation: a score is not a number: the model is broken")
        earned[row] = np.asarray(question.credit)[values == values.max()].min()
    _, picture = np.unique([question.image for question in questions], return_inverse=True)
    asked = np.bincount(picture)
    if (asked == 1).all() and np.isin(earned, (0, 1)).all():
        return {"accuracy": figures.share(earned[np.argsort(picture)] == 1)}
    sums = np.stack([np.bincount(picture, earned), asked], axis=-1)
    return {"accuracy": figures.ratios(sums[:, None].astype(np.float32))}


def guessing(questions: Sequence[Question]) -> float:
    """Expected ``choice`` of a blind guess."""
    return float(np.mean([np.mean(question.credit) for question in questions]))
