# SPDX-License-Identifier: Apache-2.0
"""Training in epochs whose order of images may depend on the model: the loop of ``train`` with it.

The trainer's loader knows a batch by its index alone. Here an epoch's batches are listed when it
begins, by a function that may look at the parameters; the list is part of what a checkpoint keeps,
so a run that was cut off goes on with the batches it would have had.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int
from PIL import Image

from m2jax.checkpoint.manager import Checkpoints
from m2jax.config import Experiment, UserError
from m2jax.data.loader import Loader
from m2jax.data.source import HostBatch
from m2jax.dist.launchers import detect
from m2jax.dist.preemption import Preemption
from m2jax.dist.sharding import batch_shards
from m2jax.eval.sets.records import Images
from m2jax.models.params import Params
from m2jax.obs.goodput import Goodput
from m2jax.obs.metrics import MetricWriter, read_rows
from m2jax.obs.profile import Profiler
from m2jax.obs.progress import Progress
from m2jax.obs.silent import SilentProgress
from m2jax.obs.watchdog import Watchdog
from m2jax.tasks.embedder import Pixels
from m2jax.train.loop import Loop, LoopResult
from m2jax.train.meter import Meter
from m2jax.train.state import TrainState
from m2jax.train.step import Step
from m2jax.train.task import Batch, Metrics

Batches = Sequence[Int[np.ndarray, " batch"]]  # rows of the images
Order = Callable[[int, Params], Batches]  # epoch from 0, parameters as they are -> its batches
SETTINGS = "settings.json"


class PreemptedError(UserError):
    """A run was told to end: it saved and stopped before its last step."""


class Pictures:
    """The source of an epoch: images of listed rows, with columns of numbers.

    A batch has ``image`` uint8 [n, h, w, 3], each column's rows, and ``step`` int32 [n], the number
    of the batch in the run, n times.

    Args:
        images: decoded when they are asked for, by the loader's threads.
        pixels: what the tower takes.
        columns: an array per name, a row per image.
    """

    def __init__(self, images: Images, pixels: Pixels, columns: Mapping[str, np.ndarray]) -> None:
        self.assets: dict[str, Any] = {"tokenizer": None, "preprocess": {}}
        self._images, self._pixels, self._columns = images, pixels, columns
        self.order: list[np.ndarray] = []
        self.before = 0  # batches of earlier epochs

    def begin(self, order: Batches, before: int) -> None:
        """Lists the batches of an epoch."""
        self.order, self.before = [np.asarray(rows) for rows in order], before

    def batch(self, index: int, rows: slice) -> HostBatch:
        """Rows of batch ``index`` of the epoch; those past its end are prepared but never taken."""
        chosen = self.order[min(index, len(self.order) - 1)][rows]
        images = [self._images.read(int(row)) for row in chosen]
        return {
            "image": self._pixels.of(images, Image.Resampling.BICUBIC),
            **{name: column[chosen] for name, column in self._columns.items()},
            "step": np.full(len(chosen), self.before + index, np.int32),
        }


class Epochs(Loader):
    """The trainer's loader, epoch after epoch; call ``prepare`` before each batch.

    Args:
        source: of the images.
        order: of each epoch.
        mesh: where batches go.
        batch_size: rows of a global batch.
    """

    def __init__(self, source: Pictures, order: Order, mesh: Mesh, batch_size: int) -> None:
        super().__init__(source, mesh, batch_size, prefetch=2, device_prefetch=1)
        self._source, self._order, self._epoch = source, order, -1

    def prepare(self, params: Params) -> None:
        """Begins an epoch where the last one has ended.

        Raises:
            UserError: an epoch without a batch.
        """
        if self._next_index < len(self._source.order):
            return
        self.close()
        self._epoch, before = self._epoch + 1, self._source.before + len(self._source.order)
        order = self._order(self._epoch, params)
        if not len(order):
            raise UserError("an epoch has no batch: take smaller ones")
        self._source.begin(order, before)
        self._next_index = 0

    def get_state(self) -> dict[str, Any]:
        """Where the loader is, with the batches of this epoch."""
        order = [rows.tolist() for rows in self._source.order]
        more = {"epoch": self._epoch, "before": self._source.before, "order": order}
        return super().get_state() | more

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to where another loader of the same run was."""
        super().set_state(state)
        self._epoch = int(state["epoch"])
        self._source.begin([np.array(rows) for rows in state["order"]], int(state["before"]))


class EpochLoop(Loop):
    """The trainer's loop, which shows the loader the parameters."""

    def one(self, step: int, state: TrainState) -> tuple[TrainState, Metrics, Batch]:
        """See ``Loop``."""
        cast(Epochs, self.loader).prepare(state.params)
        return super().one(step, state)


@dataclass(frozen=True)
class Run:
    """What is trained, where."""

    experiment: Experiment  # steps, saves, seed; its model and losses are not looked at
    settings: Mapping[str, Any]  # JSON-able; a run goes on with the same alone
    loader: Epochs
    mesh: Mesh
    directory: Path
    show: bool = True


def train(run: Run, step: Step, begin: Callable[[], TrainState]) -> LoopResult:
    """Trains to the last step, from the newest checkpoint of the folder if there is one.

    Args:
        run: see there.
        step: of the trainer.
        begin: makes the state before the first step.

    Raises:
        UserError: the folder is of a run with other settings, or cannot be written.
        PreemptedError: see there.
    """
    _claim(run.directory, run.settings)
    goodput = Goodput(run.directory)
    profiler = Profiler(run.experiment.log.profile, run.directory)
    checkpoints = Checkpoints(run.directory, run.experiment, run.loader.assets)
    with Preemption() as preemption, Watchdog(run.experiment.train.stall_s) as watchdog:
        restored = checkpoints.restore(step.abstract_state)
        start, state = (0, begin()) if restored is None else (restored.step, restored.state)
        if restored is not None:
            run.loader.set_state(restored.data)
        goodput.start(start)
        writer = MetricWriter(run.directory, start, run.experiment.log, dict(run.settings))
        steps = run.experiment.train.steps
        progress = Progress(steps, start) if run.show else SilentProgress()
        if restored is not None:
            progress.note(f"goes on from step {start}, saved in {run.directory}")
        rows = read_rows(run.directory / "metrics.jsonl")
        meter = Meter(
            run.loader,
            goodput,
            list(run.mesh.devices.flat),
            skipped=int(rows[-1].get("skipped_total", 0)) if rows else 0,
        )
        loop = EpochLoop(
            *(run.experiment, step, run.loader, checkpoints, writer, progress),
            *(preemption, watchdog),
            meter=meter,
            profiler=profiler,
            workdir=run.directory,
        )
        goodput.book("init")
        try:
            result = loop.run(state)
        finally:
            profiler.close()
            run.loader.close()
            writer.close()
            checkpoints.close()
    if result.preempted:
        raise PreemptedError(
            f"{run.directory}: told to end at step {result.steps}: start again to go on"
        )
    return result


def _claim(directory: Path, settings: Mapping[str, Any]) -> None:
    """Makes the folder, or finds it to be this run's."""
    file, text = directory / SETTINGS, json.dumps(dict(settings), indent=1, sort_keys=True) + "\n"
    try:
        directory.mkdir(exist_ok=True)
        if not file.exists():
            temporary = file.with_suffix(".tmp")
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, file)
        had = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--out {directory}: {error}: name a folder you may write to") from error
    had, want = _flat(had), _flat(json.loads(text))
    for key in sorted(set(had) | set(want)):
        if had.get(key) != want.get(key):
            raise UserError(
                f"{file}: {key} is {had.get(key)!r:.80} there and {want.get(key)!r:.80} in this "
                "run: name another --out or take that run's settings"
            )


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Values by dotted names, so that a message can name the one that differs."""
    if not isinstance(settings, dict):
        return {prefix.removesuffix("."): settings}
    parts = [_flat(value, f"{prefix}{key}.") for key, value in settings.items()]
    return {name: value for part in parts for name, value in part.items()}


def shuffled(count: int, batch: int, rng: np.random.Generator) -> Batches:
    """Batches of all rows in a random order; what is left over is dropped."""
    order = rng.permutation(count)
    return [order[first : first + batch] for first in range(0, count - batch + 1, batch)]


def check_alone(environ: Mapping[str, str] = os.environ) -> None:
    """Refuses to be one of several processes: each would train by itself, into the same folder.

    Raises:
        UserError: that.
    """
    found = detect(environ)
    if found.count > 1 or found.ask_jax:
        raise UserError(
            f"{found.via}: started {found.count if found.count > 1 else 'several'} processes, and "
            "this trains in one, on all devices of one machine: start one, or say that it is one "
            "with M2JAX_NUM_PROCESSES=1"
        )


def check_batch(size: int, mesh: Mesh) -> None:
    """Refuses a batch that the devices do not divide.

    Raises:
        UserError: that.
    """
    devices = batch_shards(mesh.shape)
    if size % devices:
        raise UserError(f"a batch of {size} does not divide over {devices} devices: change it")
