# SPDX-License-Identifier: Apache-2.0
"""The whole way from labelled images and an old model's vectors to a model that can search them.

Recipe of AdvBCT's authors: SGD from 0.1, a tenth of it after 5, 10 and 20 of 30 epochs. What
is stored of an old model are unit vectors; the discriminator is shown them at length sqrt(dim),
which batch-normalised ones have on average. That, and AdamW for small towers, are our choices.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from m2jax import config
from m2jax.config import Experiment, UserError
from m2jax.dist.mesh import make_mesh
from m2jax.eval.sets.records import Images
from m2jax.models.params import Params
from m2jax.optim import Optimizer, by_epoch, make_optimizer, make_sgd, transreid_rates
from m2jax.tasks import embedder, epochs
from m2jax.tasks.embedder import Embedder
from m2jax.tasks.epochs import Batches, Epochs, Pictures, Run
from m2jax.tasks.retrieval.compatible import CompatibleTask, Old, Settings, folded
from m2jax.tasks.retrieval.statistics import class_statistics
from m2jax.train.step import make_step

OPTIMISERS = ("sgd", "adamw")
MILESTONES = (1 / 6, 1 / 3, 2 / 3)  # of the epochs: 5, 10 and 20 of 30
ADAMW_DECAY = 0.05  # of matrices
ROWS = 65_536  # images whose vectors are looked at at once


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How it is trained; the published numbers unless given."""

    batch: int = 256
    optimizer: str = "sgd"  # sgd | adamw
    learning_rate: float = 0.1
    weight_decay: float = 5e-4  # of sgd
    seed: int = 0
    log_every: int = 20  # steps

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMISERS:
            raise UserError(f"optimizer {self.optimizer!r}: use one of {', '.join(OPTIMISERS)}")
        small = min(self.batch, self.log_every) < 1 or self.seed < 0
        if small or not 0 < self.learning_rate < math.inf:
            raise UserError("batch: at least 1; seed: 0 or more; learning rate: above 0")


class Labelled(NamedTuple):
    """A training set; classes that the old model knows come first."""

    images: Images
    labels: Int[np.ndarray, " images"]  # from 0 without gaps
    names: list[str]  # of the classes


class Stored(NamedTuple):
    """An old model's vectors of a training set's images."""

    vectors: Float[np.ndarray, "images dim"]  # rows of zeros: not stored
    known: int  # classes it was trained on, the first ones
    classifier: Float[np.ndarray, "dim known"] | None = None


def known_first(data: Labelled, known: Sequence[str]) -> Labelled:
    """The set with its classes in another order: those of ``known`` first, in that order.

    Raises:
        UserError: a class that the set has not, or that is named twice.
    """
    twice = [name for name, count in collections.Counter(known).items() if count > 1]
    if twice:
        raise UserError(f"class {twice[0]!r}: of the old model's, is named twice: name it once")
    place = {name: number for number, name in enumerate(data.names)}
    missing = [name for name in known if name not in place]
    if missing:
        raise UserError(f"class {missing[0]!r}: the old model knows it and the set has it not")
    rest = [name for name in data.names if name not in set(known)]
    order = [place[name] for name in (*known, *rest)]
    new = np.empty(len(order), np.int64)
    new[order] = np.arange(len(order))
    return Labelled(data.images, new[data.labels], [data.names[at] for at in order])


def old_of(stored: Stored, labels: Int[np.ndarray, " images"], classes: int) -> Old:
    """Statistics of the old model's classes, over the images whose vectors are stored.

    Raises:
        UserError: no vector of a class it was trained on.
    """
    there = np.abs(stored.vectors).max(1) > 0
    mine = there & (labels < stored.known)
    if not mine.any():
        raise UserError("old model: no vector of its classes' images: name those it was trained on")
    own = class_statistics(lambda: _rows(stored, labels, mine), stored.known)
    every = class_statistics(lambda: _rows(stored, labels, there), classes)
    angles = own.angle_max.astype(np.float32)
    return Old(own.old_classes(), angles, every.centres.astype(np.float32), stored.classifier)


def _rows(stored: Stored, labels: np.ndarray, kept: np.ndarray) -> Iterator[tuple[Any, Any]]:
    """Vectors and labels of some images, ROWS at a time: statistics are made in float64."""
    rows = np.flatnonzero(kept)
    for first in range(0, len(rows), ROWS):
        part = rows[first : first + ROWS]
        yield stored.vectors[part], labels[part]


def shown(stored: Stored, seed: int) -> Float[np.ndarray, "images dim"]:
    """What the discriminator sees; another image's vector stands for one that is not stored.

    It tells models apart, not images, so whose vector it is does not matter to it.
    """
    vectors = np.asarray(stored.vectors, np.float32)
    there = np.flatnonzero(np.abs(vectors).max(1) > 0)
    rows = np.arange(len(vectors))
    lacking = np.setdiff1d(rows, there)
    rows[lacking] = np.random.default_rng((seed, 23)).choice(there, len(lacking))
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return unit[rows] * np.sqrt(vectors.shape[1])


def rates(recipe: Recipe, count: int) -> list[float]:
    """Learning rates of the epochs: steps for SGD as published, half a cosine for AdamW."""
    if recipe.optimizer == "adamw":
        return transreid_rates(recipe.learning_rate, count)
    ends = [round(share * count) for share in MILESTONES]
    return [recipe.learning_rate * 0.1 ** sum(at >= end for end in ends) for at in range(count)]


def train(
    data: Labelled,
    settings: Settings,
    recipe: Recipe,
    directory: Path,
    *,
    stored: Stored | None = None,
    start: Params | None = None,
    mesh: Mesh | None = None,
    show: bool = True,
) -> Embedder:
    """Trains into a folder, or goes on there; leaves the model in its ``model``.

    Args:
        data: labelled images; the classes of the old model come first.
        settings: of the model; classes, dim and steps are filled in.
        recipe: of the training.
        directory: of the run.
        stored: of the old model; none where ``method`` is none.
        start: parameters of a tower to start from: see ``from_vision_tower``.
        mesh: where it is trained; all devices if not given.
        show: print progress.

    Raises:
        UserError: settings that exclude each other, fewer images than a batch, a batch that the
            devices do not divide, or another run's folder.
        PreemptedError: told to end before the last step; started again, it goes on.
    """
    batch, count = recipe.batch, len(data.labels)
    if batch > count:
        raise UserError(f"--batch {batch}: more than the {count} images: lower it")
    if settings.method == "hot-refresh" and stored is not None:
        if not np.abs(stored.vectors).max(1).all():
            raise UserError("--method hot-refresh: needs the old vector of every image: embed all")
    settings = dataclasses.replace(
        settings,
        classes=len(data.names),
        dim=settings.dim if stored is None else stored.vectors.shape[1],
        steps=count // batch,
    )
    steps = settings.epochs * settings.steps
    experiment = _experiment(recipe, settings)
    mesh = mesh or make_mesh(experiment.mesh)
    epochs.check_batch(batch, mesh)
    old = None if stored is None else old_of(stored, data.labels, len(data.names))
    task = CompatibleTask(settings, old, start, mesh)
    step = make_step(
        experiment, task, mesh, optimizer=_optimizer(recipe, settings, experiment, task)
    )
    columns: dict[str, np.ndarray] = {"label": data.labels.astype(np.int32)}
    if stored is not None:
        columns["old"] = shown(stored, recipe.seed).astype(np.float32)

    def order(epoch: int, _: Params) -> Batches:
        return epochs.shuffled(count, batch, np.random.default_rng((recipe.seed, 19, epoch)))

    loader = Epochs(Pictures(data.images, settings.pixels, columns), order, mesh, batch)
    settled = {"settings": asdict(settings), "recipe": asdict(recipe), "init": start is not None}
    run = Run(experiment, settled, loader, mesh, directory, show)
    result = epochs.train(run, step, step.init)
    found = jax.tree.map(np.asarray, result.state.params)
    report = {"seconds": result.seconds, "steps": steps, "classes": data.names, **settled}
    made = Embedder(
        tower=settings.tower,
        pixels=settings.pixels,
        params={"tower": found["tower"], "head": folded(found)},
        classifier=found["classifier"]["kernel"],
        report=report,
    )
    if not (directory / embedder.INSIDE).exists():
        embedder.write(directory / embedder.INSIDE, made)
    return made


def _optimizer(
    recipe: Recipe, settings: Settings, experiment: Experiment, task: CompatibleTask
) -> Optimizer:
    schedule = by_epoch(rates(recipe, settings.epochs), settings.steps)
    if recipe.optimizer == "sgd":
        return make_sgd(schedule, weight_decay=recipe.weight_decay, frozen=task.frozen)
    steps = experiment.train.steps
    return make_optimizer(experiment.optim, steps, frozen=task.frozen, schedule=schedule)


def _experiment(recipe: Recipe, settings: Settings) -> Experiment:
    """What the trainer must know; the model is the task's."""
    steps = settings.epochs * settings.steps
    return Experiment(
        model=config.resolve(config.Model()),
        data=config.Data(batch_size=recipe.batch),
        optim=config.Optim(weight_decay=ADAMW_DECAY, clip_norm=1.0, b2=0.98),
        train=config.Train(steps=steps, log_every=recipe.log_every, seed=recipe.seed),
        checkpoint=config.Checkpoint(every=settings.steps),
        log=config.Log(tensorboard=False),
    )
