# SPDX-License-Identifier: Apache-2.0
"""The whole recipe: from a table of images to a classifier, and from another to observations."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from m2jax.bundle import Bundle
from m2jax.config import UserError
from m2jax.eval import multilabel
from m2jax.eval.sets.records import Files, Images
from m2jax.losses import longtail
from m2jax.tasks.labels import features
from m2jax.tasks.longtail import model as model_lib
from m2jax.tasks.longtail import postprocess, table, views
from m2jax.tasks.longtail.model import Data, Pairs, Settings
from m2jax.tasks.longtail.postprocess import Merge, Observations
from m2jax.tasks.longtail.saved import Saved
from m2jax.tasks.longtail.table import Codes, Row
from m2jax.tasks.longtail.views import Views

HEAD, TAIL = 100, 20  # images of training: as many and more are head, fewer than these tail
TAU = 0.7  # post hoc, chosen on validation by the public code


@dataclass(frozen=True)
class Steps:
    """What follows the classifier; each can be left out."""

    views: Views = views.FULL
    tau: float = 0.0  # taken off after training
    place_filter: bool = True
    merge: Merge = "best"

    def __post_init__(self) -> None:
        if not (self.tau >= 0 and math.isfinite(self.tau)):
            raise UserError(f"--tau {self.tau}: must be a number not below 0")


class Result(NamedTuple):
    """What was found."""

    scores: Float[np.ndarray, "images classes"]  # after the filter
    observations: Observations
    unknown: Mapping[str, Mapping[str, int]]


def fit(
    backbone: Bundle,
    rows: Sequence[Row],
    settings: Settings,
    *,
    unlabelled: Sequence[Row] = (),
    batch: int = 64,
    show: bool = True,
) -> Saved:
    """Trains on a table's images, each seen plain and mirrored.

    Args:
        backbone: whose features are used.
        rows: of the training table.
        settings: of the classifier and of its training.
        unlabelled: further images, such as those of the test, for ``contrast``.
        batch: images at once.
        show: say on the terminal how far it is.
    """
    codes = table.codes(rows)
    begin = time.monotonic()
    every = views.view_features(
        backbone,
        Files([row.file for row in (*rows, *unlabelled)]),
        Views(mirror=True),
        length=settings.normalize == "none",
        batch=batch,
        show=show,
    )
    encoding = time.monotonic() - begin
    pairs = Pairs(every, codes.side([*rows, *unlabelled]))
    seen, mark = every[: len(rows)], features.fingerprint(backbone)
    found = fitted(seen, codes, rows, settings, model=mark, pairs=pairs)
    report = dict(found.report) | {"encode_s": encoding, "images": len(rows)}
    return Saved(
        found.codes, settings, found.params, found.counts, found.allowed, found.model, report
    )


def fitted(
    seen: Float[np.ndarray, "images views dim"],
    codes: Codes,
    rows: Sequence[Row],
    settings: Settings,
    *,
    model: str,
    pairs: Pairs | None = None,
) -> Saved:
    """The part of ``fit`` after the backbone."""
    labels, count = codes.labels(rows), seen.shape[1]
    data = Data(
        seen.reshape(-1, seen.shape[-1]),
        np.repeat(codes.side(rows), count, axis=0),
        np.repeat(labels, count),
    )
    begin = time.monotonic()
    params = model_lib.train(data, len(codes.classes), settings, pairs)
    allowed = postprocess.places_of(
        codes.places(rows), labels, len(codes.values["code"]), len(codes.classes)
    )
    counts = np.bincount(labels, minlength=len(codes.classes))
    report = {"train_s": time.monotonic() - begin, "metadata": codes.unknown(rows)}
    return Saved(codes, settings, params, counts, allowed, model, report)


def predict(
    backbone: Bundle,
    saved: Sequence[Saved],
    rows: Sequence[Row],
    steps: Steps,
    *,
    weights: Sequence[float] = (),
    pictures: Images | None = None,
    batch: int = 64,
    show: bool = False,
) -> Result:
    """One class per observation, by one classifier or several together.

    Raises:
        UserError: a classifier of another backbone or of other classes, or adjustment twice.
    """
    # All that can be refused is refused before the images are gone through.
    weights = postprocess.weights_of(weights, len(saved))
    first = saved[0]
    for each in saved:
        _check_tau(each, steps)
        if features.fingerprint(backbone) != each.model:
            raise UserError("--classifier: was trained on another model: use that one")
        if each.codes != first.codes:
            raise UserError("--classifier: trained on other tables: they cannot be one ensemble")
    pictures = pictures or Files([row.file for row in rows])
    seen = {
        length: views.view_features(
            backbone, pictures, steps.views, length=length, batch=batch, show=show
        )
        for length in sorted({each.settings.normalize == "none" for each in saved})
    }
    scores = [scored(each, seen[each.settings.normalize == "none"], rows, steps) for each in saved]
    return finished(first, postprocess.ensembled(scores, weights), rows, steps)


def scored(
    saved: Saved, seen: Float[np.ndarray, "images views dim"], rows: Sequence[Row], steps: Steps
) -> Float[np.ndarray, "images classes"]:
    """Probabilities of one classifier, the mean over views.

    Raises:
        UserError: classes' shares are taken off that training has taken off already.
    """
    _check_tau(saved, steps)
    counts = np.maximum(saved.counts, 1)
    prior = steps.tau * np.asarray(longtail.log_prior(jnp.asarray(counts)), np.float64)
    side = jnp.asarray(saved.codes.side(rows))
    found = [
        np.asarray(model_lib.logits(saved.params, jnp.asarray(view), side, saved.settings))
        for view in seen.swapaxes(0, 1)
    ]
    return views.mean_probabilities([postprocess.probabilities(each, prior) for each in found])


def _check_tau(saved: Saved, steps: Steps) -> None:
    if steps.tau and saved.settings.trained_adjustment:
        raise UserError(
            f"--tau {steps.tau}: this classifier was trained with {saved.settings.loss} logits: "
            "take 0, or train it with --loss plain"
        )


def finished(
    saved: Saved, scores: Float[np.ndarray, "images classes"], rows: Sequence[Row], steps: Steps
) -> Result:
    """The filter by place and the merging of observations."""
    if steps.place_filter:
        scores = postprocess.filtered(scores, saved.codes.places(rows), saved.allowed)
    merged = postprocess.merged(scores, [row.observation for row in rows], steps.merge)
    return Result(scores, merged, saved.codes.unknown(rows))


def figures(saved: Saved, result: Result, rows: Sequence[Row]) -> dict[str, float]:
    """Macro-F1 over observations, over all and by how many images training had of a class."""
    of = truth_of(saved, rows)
    truth = np.array([of[str(each)] for each in result.observations.ids])
    each = multilabel.per_class_f1(result.observations.classes, truth, len(saved.codes.classes))
    there = np.isin(np.arange(len(each)), truth)
    parts: dict[str, Bool[np.ndarray, " classes"]] = {
        "head": saved.counts >= HEAD,
        "medium": (saved.counts < HEAD) & (saved.counts >= TAIL),
        "tail": saved.counts < TAIL,
    }
    found = {
        "macro_f1": multilabel.macro_f1(result.observations.classes, truth),
        "macro_f1_all_classes": multilabel.macro_f1(
            result.observations.classes, truth, len(saved.codes.classes)
        ),
        "accuracy": float((result.observations.classes == truth).mean()),
    }
    for name, part in parts.items():
        if (part & there).any():
            found[f"macro_f1_{name}"] = float(each[part & there].mean())
    return found


def truth_of(saved: Saved, rows: Sequence[Row]) -> dict[str, int]:
    """The class number of each observation.

    Raises:
        UserError: a class that training does not have, or an observation of two.
    """
    found: dict[str, int] = {}
    for row, label in zip(rows, saved.codes.labels(rows), strict=True):
        if found.setdefault(row.observation, int(label)) != label:
            raise UserError(
                f"--table: observation {row.observation}: its images are of two classes: mend them"
            )
    return found


def as_json(saved: Saved, result: Result, rows: Sequence[Row]) -> dict[str, Any]:
    """One object per observation, and what of the metadata was not known."""
    places = saved.codes.places(rows)
    names = saved.codes.classes
    images: dict[str, list[dict[str, Any]]] = {}
    for row, place, scores in zip(rows, places, result.scores, strict=True):
        best = int(scores.argmax())
        images.setdefault(row.observation, []).append(
            {
                "image": str(row.file),
                "class": names[best],
                "score": round(float(scores[best]), 6),
                "place": row.side["code"] if place != postprocess.UNKNOWN else None,
            }
        )
    merged = zip(*result.observations, strict=True)
    rows_of = [
        {
            "observation": str(ident),
            "class": names[int(label)],
            "score": round(float(score), 6),
            "images": images[str(ident)],
        }
        for ident, label, score in merged
    ]
    return {"observations": rows_of, "metadata": {k: dict(v) for k, v in result.unknown.items()}}
