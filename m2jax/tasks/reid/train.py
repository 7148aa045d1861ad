# SPDX-License-Identifier: Apache-2.0
"""Training a re-identification model: DC-Former on batches of random or of alike identities.

Source of recipe and rates: the code that DC-Former's authors publish. Its drop path, mixed
precision and resized bicubic grid are not here; AdamW beside its SGD is our choice for towers that
start from nothing.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from m2jax import config
from m2jax.config import Experiment, UserError
from m2jax.dist.mesh import make_mesh
from m2jax.models.params import Params
from m2jax.optim import Optimizer, by_epoch, make_optimizer, make_sgd, transreid_rates
from m2jax.tasks import embedder, epochs
from m2jax.tasks.embedder import Embedder, Pixels
from m2jax.tasks.epochs import Batches, Epochs, Pictures, Run
from m2jax.tasks.reid.dcformer import DCFormerTask, Settings
from m2jax.tasks.reid.prototypes import Prototypes
from m2jax.tasks.reid.readers import ReidSet
from m2jax.tasks.reid.samplers import SAMPLERS, counts_of_groups, pk
from m2jax.train.step import make_step

BATCHES = ("pk", *SAMPLERS)
OPTIMISERS = ("sgd", "adamw")
ADAMW_DECAY = 0.05  # of matrices


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How it is trained; the published numbers unless given."""

    batches: str = "pk"  # pk | window (published hard batches) | nearest (ours)
    p: int = 16  # identities of a batch
    k: int = 4  # images of each
    epochs: int = 120
    optimizer: str = "sgd"  # sgd | adamw
    learning_rate: float = 0.008  # at the peak
    weight_decay: float = 1e-4  # of sgd
    seed: int = 0
    log_every: int = 20  # steps
    save_every: int = 0  # steps; 0: an epoch

    def __post_init__(self) -> None:
        for key, value, known in (
            ("batches", self.batches, BATCHES),
            ("optimizer", self.optimizer, OPTIMISERS),
        ):
            if value not in known:
                raise UserError(f"{key} {value!r}: use one of {', '.join(known)}")
        small = min(self.p, self.k, self.epochs, self.log_every) < 1 or self.seed < 0
        if small or not 0 < self.learning_rate < math.inf:
            raise UserError("p, k, epochs: at least 1; seed: 0 or more; learning rate: above 0")


class Identities:
    """The order of an epoch; hard batches look at the first token's classifier or its means.

    Args:
        labels: identity of each image.
        recipe: which batches.
        width: of a token.
        mesh: where the prototypes lie.
    """

    def __init__(self, labels: np.ndarray, recipe: Recipe, width: int, mesh: Any) -> None:
        self._labels, self._recipe = labels, recipe
        self._prototypes = None
        if recipe.batches != "pk":
            count = int(labels.max()) + 1
            rng = jax.random.key(recipe.seed)
            self._prototypes = Prototypes(count, width, rng, mesh=mesh)

    def __call__(self, epoch: int, params: Params) -> Batches:
        """Of epoch 0 by random prototypes, as published; then by what was trained by then."""
        cfg, rng = self._recipe, np.random.default_rng((self._recipe.seed, 17, epoch))
        if self._prototypes is None:
            return list(pk(self._labels, cfg.p, cfg.k, rng))
        if epoch:
            by_features = "prototypes" in params
            kernel = params["heads"]["kernel"][0].T
            self._prototypes.refresh(params["prototypes"]["mean"] if by_features else kernel)
        sampler = SAMPLERS[cfg.batches]
        return list(sampler(self._labels, cfg.p, cfg.k, rng, self._prototypes.similarities))


def steps_per_epoch(labels: np.ndarray, recipe: Recipe) -> int:
    """Batches that an epoch's groups of images fill; what is left over makes real ones shorter."""
    groups = counts_of_groups(np.bincount(labels), recipe.k).sum()
    return max(int(groups) // recipe.p, 1)


def optimizer_of(recipe: Recipe, experiment: Experiment, per_epoch: int) -> Optimizer:
    """SGD as published, or AdamW; both at TransReID's rates, a step of them per epoch."""
    schedule = by_epoch(transreid_rates(recipe.learning_rate, recipe.epochs), per_epoch)
    if recipe.optimizer == "sgd":
        return make_sgd(schedule, weight_decay=recipe.weight_decay, bias_factor=2.0)
    return make_optimizer(experiment.optim, experiment.train.steps, schedule=schedule)


def train(
    data: ReidSet,
    settings: Settings,
    recipe: Recipe,
    directory: Path,
    *,
    start: Params | None = None,
    mesh: Mesh | None = None,
    show: bool = True,
) -> Embedder:
    """Trains into a folder, or goes on there; leaves the model in its ``model``.

    Args:
        data: its training split is used.
        settings: of the model; identities, cameras and steps are filled in from the data.
        recipe: of the training.
        directory: of the run.
        start: parameters of a tower to start from: see ``from_vision_tower``.
        mesh: where it is trained; all devices if not given.
        show: print progress.

    Raises:
        UserError: settings that exclude each other, a batch that the devices do not divide,
            or another run's folder.
        PreemptedError: told to end before the last step; started again, it goes on.
    """
    labels = data.train.labels
    if recipe.p > (count := len(np.unique(labels.identities))):
        raise UserError(f"P={recipe.p}: the set has {count} identities: lower it")
    if settings.prototypes != "classifier" and recipe.batches == "pk":
        raise UserError(
            f"prototypes={settings.prototypes}: random batches look at none: take batches "
            f"{' or '.join(SAMPLERS)}"
        )
    per_epoch = steps_per_epoch(labels.identities, recipe)
    steps = recipe.epochs * per_epoch
    settings = dataclasses.replace(
        settings,
        identities=int(labels.identities.max()) + 1,
        cameras=int(labels.cameras.max()) + 1 if settings.scenes != "none" else 0,
        steps=steps,
    )
    experiment = _experiment(recipe, steps, per_epoch)
    mesh = mesh or make_mesh(experiment.mesh)
    epochs.check_batch(recipe.p * recipe.k, mesh)
    task = DCFormerTask(settings, mesh, start)
    step = make_step(experiment, task, mesh, optimizer=optimizer_of(recipe, experiment, per_epoch))
    columns = {
        "identity": labels.identities.astype(np.int32),
        "camera": labels.cameras.astype(np.int32),
    }
    tower = settings.tower
    pixels = Pixels(
        height=tower.height, width=tower.image_width, mean=settings.mean, std=settings.std
    )
    source = Pictures(data.train.images, pixels, columns)
    order = Identities(labels.identities, recipe, tower.width, mesh)
    loader = Epochs(source, order, mesh, recipe.p * recipe.k)
    settled = {"settings": asdict(settings), "recipe": asdict(recipe), "init": start is not None}
    run = Run(experiment, settled, loader, mesh, directory, show)
    result = epochs.train(run, step, step.init)
    report = {"seconds": result.seconds, "steps": result.steps, **settled}
    params = {"tower": jax.tree.map(np.asarray, result.state.params["tower"])}
    made = Embedder(tower=tower, pixels=pixels, params=params, report=report)
    if not (directory / embedder.INSIDE).exists():
        embedder.write(directory / embedder.INSIDE, made)
    return made


def _experiment(recipe: Recipe, steps: int, per_epoch: int) -> Experiment:
    """What the trainer must know; the model is the task's."""
    return Experiment(
        model=config.resolve(config.Model()),
        data=config.Data(batch_size=recipe.p * recipe.k),
        optim=config.Optim(weight_decay=ADAMW_DECAY, clip_norm=1.0, b2=0.98),
        train=config.Train(steps=steps, log_every=recipe.log_every, seed=recipe.seed),
        checkpoint=config.Checkpoint(every=recipe.save_every or per_epoch),
        log=config.Log(tensorboard=False),
    )
