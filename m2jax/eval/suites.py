# SPDX-License-Identifier: Apache-2.0
"""Suites over data sets: a reader gives pictures, a protocol gives figures, a suite pairs the two.

A new suite is a line in ``SUITES``; a new data set a line in ``sets.READERS``; a new protocol a
function here. Metrics are named ``PROTOCOL/NAME/LANGUAGE/FIGURE``.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from m2jax.config import UserError
from m2jax.eval import features, figures, finetune, probe, prompts, retrieval, sets, zero_shot
from m2jax.eval.emoji import Encoder
from m2jax.eval.figures import Figure
from m2jax.eval.sets.records import (
    Asked,
    Captioned,
    DataSet,
    Files,
    Images,
    Labelled,
    Place,
    Question,
)
from m2jax.eval.sets.shards import Pictures

Metrics = dict[str, Figure]

WORDNET = r"n\d{8}"  # a folder of ImageNet, which no caption names
NAMES = "give names with --classes FILE"


@runtime_checkable
class Rater(Protocol):
    """Says how likely a text is, given a picture: a ``Captioner``."""

    @property
    def languages(self) -> tuple[str, ...]:
        """Those it knows."""
        ...

    def log_likelihood(
        self, images: Sequence[Image.Image], texts: Sequence[str], *, language: str
    ) -> np.ndarray:
        """Of each text given its picture (or the one of all), in nats."""
        ...


@dataclass(frozen=True)
class Request:
    """What a protocol is told besides the data."""

    name: str  # of the data set, in the names of metrics
    place: Place
    reader: str = ""  # of the suite; empty: what the place says
    train_split: str = "train"
    train_data: Path | None = None  # of probes: where that lies, if not in the data set
    recipe: finetune.Recipe | None = None  # of fine-tuning; its own if not given
    languages: Sequence[str] = ("en", "zh")
    templates: Mapping[str, Sequence[str]] = field(default_factory=dict)
    batch: int = 64
    rater: Rater | None = None
    show: bool = False  # progress on the terminal

    def rated_by(self, rater: Rater | None) -> Request:
        """The same, with a model that says how likely texts are."""
        return replace(self, rater=rater)


def zero_shot_protocol(model: Encoder, data: Labelled, request: Request) -> Metrics:
    """Every language that classes have names in, with its prompts."""
    for name in (name for names in data.classes.values() for each in names for name in each):
        if re.fullmatch(WORDNET, name):
            raise UserError(f"zero-shot: class {name} is called by its number: {NAMES}")
    images = features.image_features(model, data.images, batch=request.batch, show=request.show)
    found: Metrics = {}
    for language in _languages(data.classes, request):
        templates = (
            request.templates.get(language)
            or data.templates.get(language)
            or prompts.TEMPLATES[language]
        )
        weights = zero_shot.classifier(
            model, data.classes[language], templates, batch=request.batch
        )
        if data.multi_label:
            scored = zero_shot.multi_label(images @ weights.T, _shown(data, len(weights)))
        else:
            scored = zero_shot.classification(images, weights, _single(data))
            found[f"baseline/chance/{request.name}/top1"] = figures.exactly(1 / len(weights))
        found |= _under(f"zero_shot/{request.name}/{language}", scored)
    return found


def retrieval_protocol(model: Encoder, data: Captioned, request: Request) -> Metrics:
    """Every language with captions, in each of the published protocols."""
    images = features.image_features(model, data.images, batch=request.batch, show=request.show)
    found: Metrics = {}
    for language in _languages(data.captions, request):
        captions = data.captions[language]
        stem = f"retrieval/{request.name}/{language}"
        texts = [text for each in captions for text in each]
        unique, rows = features.unique_text_features(model, texts, batch=request.batch)
        for protocol in ("standard", "m2_release"):
            said = [retrieval.release_text(t) for t in texts] if protocol == "m2_release" else texts
            if said != texts:
                unique, rows = features.unique_text_features(model, said, batch=request.batch)
            answers = getattr(retrieval, protocol)(captions)
            scored = retrieval.score(images, unique[rows], answers)
            found |= _under(f"{stem}/{protocol}", scored)
            if protocol == "standard" and len(texts) > len(captions):
                kept = rows[retrieval.longest(captions)]
                own = retrieval.standard([["-"]] * len(captions))
                scored = retrieval.score(images, unique[kept], own)
                found |= _under(f"{stem}/one_caption", scored)
        key = f"data/{request.name}/{language}/captions_per_image"
        found[key] = figures.exactly(len(texts) / len(captions))
    return found


def choice_protocol(model: Encoder, data: Asked, request: Request) -> Metrics:
    """Questions with candidate texts: by the cosine, and where a decoder is there by likelihood."""
    images = features.image_features(model, data.images, batch=request.batch, show=request.show)
    found: Metrics = {}
    for language in _languages(data.questions, request):
        questions = data.questions[language]
        texts = [text for question in questions for text in question.texts]
        unique, rows = features.unique_text_features(model, texts, batch=request.batch)
        ends = np.cumsum([0] + [len(q.texts) for q in questions])
        scores = [
            unique[rows[a:b]] @ images[q.image]
            for q, (a, b) in zip(questions, itertools.pairwise(ends), strict=True)
        ]
        stem = f"choice/{request.name}/{language}"
        found |= _under(stem, zero_shot.choice(scores, questions))
        rater = request.rater
        if rater is not None and language in rater.languages:
            rated = [_rated(rater, data, question, language) for question in questions]
            written = zero_shot.choice(rated, questions)
            found |= {f"{stem}/{key}_by_likelihood": each for key, each in written.items()}
        chance = zero_shot.guessing(questions)
        found[f"baseline/chance/{request.name}/{language}/accuracy"] = figures.exactly(chance)
    return found


def _rated(rater: Rater, data: Asked, question: Question, language: str) -> np.ndarray:
    """Log-likelihoods of one question's texts. They share the question, whose share cancels."""
    picture = data.images.read(question.image)
    return rater.log_likelihood([picture], question.texts, language=language)


def probe_protocol(model: Encoder, data: Labelled, request: Request) -> Metrics:
    """Logistic regression on frozen features, its weight decay chosen on part of training."""
    labels, training = _single(data), _training(data, request)
    train, test = (
        features.image_features(model, each.images, batch=request.batch, show=request.show)
        for each in (training, data)
    )
    classes = len(next(iter(data.classes.values())))
    fitted = probe.fit_best(train, _single(training), classes)
    found = _ranked(probe.ranks(fitted, test, labels), labels, classes)
    return _under(f"linear_probe/{request.name}", found)


def finetune_protocol(model: Encoder, data: Labelled, request: Request) -> Metrics:
    """All of the image encoder trained with a linear head on top."""
    labels, training = _single(data), _training(data, request)
    classes = len(next(iter(data.classes.values())))
    tuned = finetune.train(
        *(model, training.images, _single(training), classes),
        recipe=request.recipe,
        show=request.show,
    )
    first = finetune.ranks(tuned, model, data.images, labels, batch=request.batch)
    return _under(f"fine_tune/{request.name}", _ranked(first, labels, classes))


class Suite(NamedTuple):
    """A pairing."""

    protocol: Callable[..., Metrics]
    takes: type  # what the reader must give
    reader: str = ""  # empty: the one that --data names or looks like
    split: str = "test"


SUITES: dict[str, Suite] = {
    "zero-shot": Suite(zero_shot_protocol, Labelled),
    "retrieval": Suite(retrieval_protocol, Captioned),
    "choice": Suite(choice_protocol, Asked),
    "linear-probe": Suite(probe_protocol, Labelled),
    "fine-tune": Suite(finetune_protocol, Labelled),
    "imagenet": Suite(zero_shot_protocol, Labelled, "folder", "val"),
    "cub": Suite(zero_shot_protocol, Labelled, "cub"),
    "dogs": Suite(zero_shot_protocol, Labelled, "dogs"),
    "cars": Suite(zero_shot_protocol, Labelled, "cars"),
    "coco-objects": Suite(zero_shot_protocol, Labelled, "coco-objects", "val2017"),
    "coco-count": Suite(choice_protocol, Asked, "coco-count", "val2017"),
    "vg-position": Suite(choice_protocol, Asked, "vg-position"),
    "vg-interaction": Suite(choice_protocol, Asked, "vg-interaction"),
    "vqa": Suite(choice_protocol, Asked, "vqa", "val2014"),
}


class Scored(NamedTuple):
    """What a suite found."""

    figures: Metrics
    questions: str  # a digest of what was asked: equal digests can be compared in pairs


def score(model: Encoder, suite: str, request: Request) -> Scored:
    """Reads the data set of a request and scores a model on it.

    Raises:
        UserError: the data set cannot be read, or is of another kind than the suite asks about.
    """
    check(suite, request)
    pairing = SUITES[suite]
    data = sets.read(request.place, request.reader or pairing.reader)
    if not isinstance(data, pairing.takes):
        kinds = {Labelled: "labels", Captioned: "captions", Asked: "questions"}
        raise UserError(
            f"--suite {suite}: {request.place.path} has {kinds[type(data)]}, not "
            f"{kinds[pairing.takes]}: use another suite"
        )
    if not len(data.images):
        raise UserError(f"{request.place.path}: has no pictures: name another data set or split")
    return Scored(pairing.protocol(model, data, request), _digest(data))


def check(suite: str, request: Request) -> None:
    """Refuses what would give figures that say nothing, before any model or data set is read.

    Raises:
        UserError: a probe would be trained on its test, or ImageNet's classes have no names.
    """
    place, pairing = request.place, SUITES[suite]
    if suite == "imagenet" and place.names is None:
        raise UserError(f"--suite imagenet: its classes are called by number: {NAMES}")
    if pairing.protocol not in (probe_protocol, finetune_protocol) or request.train_data:
        return
    if request.train_split == place.split:
        raise UserError(
            f"--train-split {place.split}: is the test itself: name another, or give --train-data"
        )
    for split in (place.split, request.train_split):
        if not sets.has_split(place._replace(split=split), request.reader or pairing.reader):
            raise UserError(
                f"--suite {suite}: {place.path} has no split {split}: give --train-data PATH, or "
                "write {split} where its name goes in --data"
            )


def _digest(data: DataSet) -> str:
    """Of labels, captions or questions; pictures are taken to be those that belong to them."""
    if isinstance(data, Labelled):
        asked: object = [sorted(each) for each in data.labels]
    else:
        asked = data.captions if isinstance(data, Captioned) else data.questions
    return hashlib.sha256(json.dumps(asked, sort_keys=True, default=list).encode()).hexdigest()


def _languages(there: Mapping[str, object], request: Request) -> list[str]:
    """The languages that are asked for and there."""
    found = [language for language in request.languages if language in there]
    missing = [language for language in request.languages if language not in there]
    if not found:
        raise UserError(
            f"--languages {','.join(request.languages)}: {request.place.path} has "
            f"{', '.join(there)}: use those, or give names with --classes FILE"
        )
    if missing and request.show:
        print(f"{request.name}: nothing in {', '.join(missing)}", file=sys.stderr)
    return found


def _training(data: Labelled, request: Request) -> Labelled:
    """What is trained on: classes as in the test, and none of its pictures."""
    place = request.place._replace(
        split=request.train_split, path=request.train_data or request.place.path, asked=False
    )
    training = sets.read(place, request.reader)
    if not isinstance(training, Labelled) or dict(training.classes) != dict(data.classes):
        raise UserError(
            f"--train-split {request.train_split}: classes of {place.path} differ from those of "
            f"{request.place.split}: give both the same"
        )
    shared = sorted(_identities(training.images) & _identities(data.images))
    if shared:
        raise UserError(
            f"{place.path}: trains on {len(shared):,} pictures of the test, such as {shared[0]}: "
            "keep them apart"
        )
    return training


def _identities(images: Images) -> set[str]:
    """What tells pictures apart without opening them; none where nothing does (TFDS)."""
    if isinstance(images, Files):
        return {os.path.abspath(path) for path in images.paths}
    if isinstance(images, Pictures):
        return {f"{os.path.abspath(m.file)}: byte {m.offset}" for m in images.members}
    return set()


def _single(data: Labelled) -> np.ndarray:
    """The one label of each picture."""
    if data.multi_label or any(len(each) != 1 for each in data.labels):
        raise UserError("a picture has no label, or several: use --suite zero-shot for mAP")
    return np.array([next(iter(each)) for each in data.labels])


def _shown(data: Labelled, classes: int) -> np.ndarray:
    shown = np.zeros((len(data.labels), classes), np.bool_)
    for row, each in enumerate(data.labels):
        shown[row, list(each)] = True
    return shown


def _ranked(first: np.ndarray, labels: np.ndarray, classes: int) -> Metrics:
    found = {f"top{k}": figures.share(first < k) for k in (1, 5) if k < classes}
    return {**found, "mean_per_class": zero_shot.class_mean(first < 1, labels)}


def _under(stem: str, found: Mapping[str, Figure]) -> Metrics:
    return {f"{stem}/{key}": figure for key, figure in found.items()}
