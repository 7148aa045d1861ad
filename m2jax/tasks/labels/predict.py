# SPDX-License-Identifier: Apache-2.0
"""Which labels images show, as rows for JSON and for a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from m2jax.bundle import Bundle
from m2jax.config import UserError
from m2jax.eval.sets.records import Images
from m2jax.tasks import page
from m2jax.tasks.labels import features, train, vocabulary, zero_shot
from m2jax.tasks.labels.saved import Saved
from m2jax.tasks.labels.vocabulary import Vocabulary

By = Literal["adapter", "zero-shot", "both"]


class Found(NamedTuple):
    """A label of an image."""

    label: str
    score: float
    shown: bool  # the score lies above the label's threshold


class Predicted(NamedTuple):
    """All images."""

    scores: Float[np.ndarray, "images classes"]
    images: list[list[Found]]  # of each its labels, best first


def check_model(model: Bundle, saved: Saved) -> None:
    """Refuses an adapter of another model.

    Raises:
        UserError: its fingerprint is another one.
    """
    if features.fingerprint(model) != saved.model:
        raise UserError("--adapter: was trained on another model: use that one, or train it again")


def with_labels(model: Bundle, saved: Saved, words: Vocabulary) -> Saved:
    """The adapter with labels that it was not trained with.

    Thresholds of new labels are the median of those it has.

    Raises:
        UserError: it scores by a layer of its own labels.
    """
    if saved.settings.kind != "residual":
        raise UserError(
            "--labels: this adapter knows its own labels alone: train it with --kind residual"
        )
    vocabulary.check_length(model, words)
    languages = train.languages_of(words, [x for x in saved.languages if x in words.languages])
    prompts = zero_shot.class_prompts(model, words, languages)
    limit = np.full(len(words), np.median(saved.thresholds), np.float32)
    known = {tuple(sorted(each.items())): n for n, each in enumerate(saved.vocabulary.names)}
    for row, each in enumerate(words.names):
        if (place := known.get(tuple(sorted(each.items())))) is not None:
            limit[row] = saved.thresholds[place]
    return replace(saved, vocabulary=words, prompts=prompts, thresholds=limit)


def scores(
    saved: Saved, rows: Float[np.ndarray, "images dim"], by: By = "adapter"
) -> Float[np.ndarray, "images classes"]:
    """Scores of images from their features (normalised as the adapter's settings say)."""
    if by == "adapter":
        return train.scored(dict(saved.params), rows, saved.settings, saved.prompts)
    cosines = zero_shot.scores(rows, saved.prompts)
    if by == "zero-shot":
        return cosines
    return zero_shot.together(scores(saved, rows), cosines)


def predict(
    model: Bundle, saved: Saved, pictures: Images, *, top: int, batch: int = 64, show: bool = False
) -> Predicted:
    """Labels of images: the ``top`` best, and any other above its threshold.

    Raises:
        UserError: the adapter is another model's, or an image cannot be read.
    """
    check_model(model, saved)
    length = saved.settings.normalize == "none"
    rows = features.images(model, pictures, length=length, batch=batch, show=show)
    found = scores(saved, rows)
    return Predicted(found, [_of_image(saved, each, top) for each in found])


def _of_image(saved: Saved, row: Float[np.ndarray, " classes"], top: int) -> list[Found]:
    above = row > saved.thresholds
    order = np.argsort(-row, kind="stable")
    taken = [label for place, label in enumerate(order) if place < top or above[label]]
    return [Found(saved.vocabulary.title(i), float(row[i]), bool(above[i])) for i in taken]


def as_json(names: Sequence[str], predicted: Predicted) -> list[dict[str, Any]]:
    """One object per image."""
    return [
        {
            "image": name,
            "labels": [each.label for each in row if each.shown],
            "best": [{"label": each.label, "score": round(each.score, 6)} for each in row],
        }
        for name, row in zip(names, predicted.images, strict=True)
    ]


def as_page(names: Sequence[str], pictures: Images, predicted: Predicted) -> str:
    """A page with the images; what lies above its threshold stands out."""
    cards = (
        page.Card(
            pictures.read(number),
            name,
            [page.Line(each.label, f"{each.score:.3f}", each.shown) for each in row],
        )
        for number, (name, row) in enumerate(zip(names, predicted.images, strict=True))
    )
    return page.page("m2jax labels", "Green: the score lies above the label's threshold.", cards)
