# SPDX-License-Identifier: Apache-2.0
"""An adapter's figures on a multi-label data set: mAP, CF1, OF1, zero-shot and chance beside them.

The published protocols: AP as the evaluators of ASL and TaI-DPT compute it, F1 of the labels above
their thresholds, and F1 of the three best labels of each image.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int

from m2jax.bundle import Bundle
from m2jax.config import UserError
from m2jax.eval import multilabel
from m2jax.eval.sets.records import DataSet, Labelled
from m2jax.tasks.labels import features, predict, train, vocabulary, zero_shot
from m2jax.tasks.labels.predict import By
from m2jax.tasks.labels.saved import Saved
from m2jax.tasks.labels.vocabulary import Vocabulary

TOP = 3


def score(
    model: Bundle,
    saved: Saved,
    data: DataSet,
    *,
    name: str,
    by: By = "adapter",
    batch: int = 64,
    show: bool = False,
) -> dict[str, float]:
    """Figures by name, shares between 0 and 1.

    ``labels/NAME/map|cp|cr|cf1|op|or|of1|cf1_top3|of1_top3``; ``zero_shot/NAME/...`` of the cosines
    with the same prompts; ``baseline/chance/NAME/map``, the classes' mean share of the images,
    which a ranking at random earns. Classes without an image count as 0 in all means.

    Args:
        model: the one the adapter was trained on.
        saved: the adapter; one of kind ``residual`` also takes classes it was not trained with.
        data: images with labels.
        name: of the data set in the names of figures.
        by: what ranks: the adapter, or half of it and half of zero-shot.
        batch: images at once.
        show: say on the terminal how far it is.

    Raises:
        UserError: another model's adapter, a data set without labels, or with a class that is none
            of the adapter's.
    """
    predict.check_model(model, saved)
    if not isinstance(data, Labelled) or not len(data.images):
        raise UserError("--data: has no images with labels: name another data set or split")
    if by not in ("adapter", "both"):
        raise UserError(f"--by {by}: use adapter or both")
    saved, columns = aligned(model, saved, data)
    shown = train.shown_matrix([sorted(each) for each in data.labels], len(columns))
    length = saved.settings.normalize == "none"
    rows = features.images(model, data.images, length=length, batch=batch, show=show)
    found = predict.scores(saved, rows, by)[:, columns]
    figures = _ranked(f"labels/{name}", found, shown)
    if by == "adapter":  # thresholds are of its scores
        figures |= _under(f"labels/{name}", found > saved.thresholds[columns], shown)
    cosines = zero_shot.scores(rows, saved.prompts)[:, columns]
    figures |= _ranked(f"zero_shot/{name}", cosines, shown)
    figures[f"baseline/chance/{name}/map"] = float(shown.mean(axis=0).mean())
    return figures


def aligned(model: Bundle, saved: Saved, data: Labelled) -> tuple[Saved, Int[np.ndarray, " n"]]:
    """The adapter, and of each class of a data set the column of its scores.

    Any name of a class in any language may be the adapter's. An adapter of kind ``residual`` that
    lacks one takes all classes anew, by the data set's names.

    Raises:
        UserError: a class that the adapter lacks and cannot take.
    """
    classes = _classes(data)
    place = {
        vocabulary.folded(name): label
        for label, names in enumerate(saved.vocabulary.names)
        for each in names.values()
        for name in each
    }
    found = []
    for names in classes.names:
        every = [vocabulary.folded(name) for each in names.values() for name in each]
        found.append(next((place[name] for name in every if name in place), -1))
    missing = [classes.title(n) for n, label in enumerate(found) if label < 0]
    if missing and saved.settings.kind == "residual":
        return predict.with_labels(model, saved, classes), np.arange(len(classes))
    if missing:
        raise UserError(
            f"--adapter: has no label {missing[0]!r} of the data set ({len(missing)} of "
            f"{len(classes)} are missing): train it with the data set's classes, or with --kind "
            "residual"
        )
    if len(set(found)) < len(found):
        twice = next(n for n, label in enumerate(found) if label in found[:n])
        raise UserError(
            f"--adapter: {classes.title(twice)!r} is one label with another class of the data set: "
            "name them apart"
        )
    return saved, np.array(found)


def _classes(data: Labelled) -> Vocabulary:
    """The data set's classes with their names in all its languages."""
    count = len(next(iter(data.classes.values())))
    rows = [{lang: each[n] for lang, each in data.classes.items()} for n in range(count)]
    return vocabulary.checked(rows, "--data", "class")


def _ranked(
    stem: str, found: Float[np.ndarray, "images n"], shown: Bool[np.ndarray, "images n"]
) -> dict[str, float]:
    best = multilabel.f1(multilabel.top_k(found, TOP), shown)
    return {
        f"{stem}/map": multilabel.mean_ap(found, shown).map,
        f"{stem}/cf1_top{TOP}": best.cf1,
        f"{stem}/of1_top{TOP}": best.of1,
    }


def _under(
    stem: str, above: Bool[np.ndarray, "images n"], shown: Bool[np.ndarray, "images n"]
) -> dict[str, float]:
    f1 = multilabel.f1(above, shown)
    return {f"{stem}/{key.rstrip('_')}": value for key, value in f1._asdict().items()}
