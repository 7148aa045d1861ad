# SPDX-License-Identifier: Apache-2.0
"""The loop: owns time and input and output. What one step computes is ``train/step.py``.

The order inside ``run`` is what makes a resumed run equal to an uninterrupted one: a checkpoint of
step n holds the state after n steps and the loader's state before batch n.
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from m2jax.checkpoint.manager import Checkpoints
from m2jax.checkpoint.retention import unknown
from m2jax.config import Experiment, UserError
from m2jax.data.loader import Loader
from m2jax.dist.preemption import Preemption
from m2jax.obs.metrics import MetricWriter
from m2jax.obs.profile import Profiler
from m2jax.obs.progress import Progress
from m2jax.obs.silent import SilentProgress, SilentWriter
from m2jax.obs.watchdog import Watchdog
from m2jax.train.meter import Meter
from m2jax.train.state import TrainState
from m2jax.train.step import Step
from m2jax.train.task import Batch, Metrics

# Steps handed to the devices and not yet done. One is enough to keep them busy; without a limit the
# host runs tens of steps ahead, and a save at the step it has reached waits for all of them, which
# the grace period of a preemption does not.
IN_FLIGHT = 2


class LoopResult(NamedTuple):
    """How a run ended."""

    state: TrainState
    steps: int
    seconds: float  # in the loop, compilation and earlier processes of the run included
    preempted: bool = False  # it saved and stopped early because it was told to


@dataclasses.dataclass
class Loop:
    """Everything a run touches while it goes on."""

    experiment: Experiment
    step: Step
    loader: Loader
    checkpoints: Checkpoints
    writer: MetricWriter | SilentWriter
    progress: Progress | SilentProgress
    preemption: Preemption
    watchdog: Watchdog
    rewinds: int = 0
    meter: Meter = dataclasses.field(kw_only=True)
    profiler: Profiler = dataclasses.field(kw_only=True)
    workdir: Path = dataclasses.field(kw_only=True)
    score: Callable[[TrainState], dict[str, float]] = lambda state: {}  # figures, eval.every
    flying: collections.deque[Metrics] = dataclasses.field(default_factory=collections.deque)

    def run(self, state: TrainState) -> LoopResult:
        """Runs to ``train.steps``, or to where a preemption stops it; saves on the way and then."""
        begin = last = time.perf_counter()
        before = self.writer.seconds  # of the processes this run goes on from
        step = since = int(state.step)
        steps = self.experiment.train.steps
        stop = False
        while step < steps and not stop:
            state, metrics, batch = self.one(step, state)
            if step == since:
                self.refuse_unknown(metrics)
            step += 1
            self.watchdog.beat(step)
            stop = self.preemption.reached(step)
            save = stop or step % self.experiment.checkpoint.every == 0 or step == steps
            every = self.experiment.eval.every
            # A run that was told to end has no time for it.
            due = every > 0 and step % every == 0 and not stop
            if step % self.experiment.train.log_every == 0 or step == steps or stop or due:
                skipped = int(metrics["skipped"])
                now = time.perf_counter()
                figures = self.validate(step, state, metrics) if due else {}
                pace = (step - since) / (now - last)
                self.log(step, metrics, pace, before + now - begin, figures)
                last, since = time.perf_counter(), step
                if skipped >= self.experiment.train.guard.patience:
                    state = self.rewind(step, skipped, batch)
                    save = stop
            if save:
                self.save(step, state, metrics)
                self.watchdog.beat(step)
        self.checkpoints.wait()
        self.meter.goodput.book("save")
        self.meter.goodput.write(step)
        seconds = before + time.perf_counter() - begin
        return LoopResult(state, step, seconds, preempted=stop and step < steps)

    def save(self, step: int, state: TrainState, metrics: Metrics) -> None:
        """Starts a checkpoint; reads the step's metrics only where they choose the best one."""
        jax.block_until_ready(metrics)  # a save waits for the step; that time is not its own
        self.meter.goodput.book("step")
        best = self.experiment.checkpoint.best.removeprefix("-")
        chosen_by = {best: float(metrics[best])} if best in metrics else None
        self.checkpoints.save(step, state, self.loader.get_state(), metrics=chosen_by)
        self.meter.goodput.book("save")

    def refuse_unknown(self, metrics: Metrics) -> None:
        """Refuses a ``checkpoint.best`` that no figure of this run will ever have.

        Raises:
            UserError: it is no metric of the step, and there are no evaluations.
        """
        best = self.experiment.checkpoint.best
        if best and best.removeprefix("-") not in metrics and not self.experiment.eval.every:
            raise unknown(best, metrics)

    def validate(self, step: int, state: TrainState, metrics: Metrics) -> dict[str, float]:
        """Figures of this step; its checkpoint is saved: whoever loads it gets the same."""
        self.save(step, state, metrics)
        self.checkpoints.wait()
        self.meter.goodput.book("save")
        figures = self.score(state)
        if self.experiment.checkpoint.best.removeprefix("-") not in metrics:
            self.checkpoints.score(step, figures | {name: float(v) for name, v in metrics.items()})
        self.watchdog.beat(step)
        self.meter.goodput.book("evaluation")
        return figures

    def one(self, step: int, state: TrainState) -> tuple[TrainState, Metrics, Batch]:
        """Takes a batch and dispatches one step; the batch comes back for what may go wrong."""
        batch = next(self.loader)
        self.meter.fed()
        if len(self.flying) == IN_FLIGHT:
            jax.block_until_ready(self.flying.popleft())
        self.profiler.before(step)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            state, metrics = self.step.run(state, batch)
        self.profiler.after(step, metrics)
        self.meter.stepped(metrics)
        self.flying.append(metrics)
        return state, metrics, batch

    def log(
        self,
        step: int,
        metrics: Metrics,
        steps_per_s: float,
        seconds: float,
        figures: dict[str, float],
    ) -> None:
        """One row for machines, one line for people."""
        row = {name: float(value) for name, value in metrics.items()}
        row["seconds"] = seconds
        row["learning_rate"] = float(np.asarray(self.step.schedule(step - 1)))
        row["samples_per_s"] = steps_per_s * self.experiment.data.batch_size
        row |= self.meter.row(row["samples_per_s"], steps_per_s)
        self.writer.write(step, row | figures)
        self.meter.goodput.write(step)
        self.progress.show(step, row["loss"], row["samples_per_s"])
        if figures:
            self.progress.note(f"step {step}: {headline(figures)}")

    def rewind(self, step: int, skipped: int, batch: Batch) -> TrainState:
        """Goes back to the last checkpoint's parameters, but on to new data with new randomness.

        The step count and the loader go on: replaying the same batches with the same keys would
        meet the same spike. A checkpoint made just before the ``skipped`` steps, or among them,
        holds what led into the spike: an older one is preferred.

        Raises:
            UserError: nothing to go back to, or this happened too often.
        """
        guard = self.experiment.train.guard
        self.rewinds += 1
        abstract = self.step.abstract_state
        restored = self.checkpoints.restore(abstract, until=step - skipped - 1)
        restored = restored or self.checkpoints.restore(abstract)
        if restored is None or self.rewinds > guard.rewinds:
            saved = save_batch(self.workdir, step, batch)
            raise UserError(
                f"train: {guard.patience} steps in a row were skipped by step {step} (loss spike "
                "or NaN), and rewinding did not help: lower optim.learning_rate or look at the "
                f"data: the batch of that step is {saved}"
            )
        self.progress.note(f"step {step}: loss spike; parameters go back to step {restored.step}")
        return dataclasses.replace(restored.state, step=jnp.asarray(step, jnp.int32))


def headline(figures: dict[str, float]) -> str:
    """The first places of a suite's figures in one line, baselines left out."""
    tops = [key for key in sorted(figures) if key.endswith("/top1") and "baseline/" not in key]
    return ", ".join(f"{key.removesuffix('/top1')} {100 * figures[key]:.1f} %" for key in tops)


def save_batch(workdir: Path, step: int, batch: Batch) -> Path:
    """Writes this process's rows of a batch, for whoever looks for what broke the run.

    Returns:
        The file: ``bad_batch_STEP.npz``, with ``_PROCESS`` from the second process on.
    """
    process = jax.process_index()
    file = workdir / f"bad_batch_{step}{f'_{process}' if process else ''}.npz"
    with file.open("wb") as out:
        rows: dict[str, Any] = {name: _own_rows(array) for name, array in batch.items()}
        np.savez(out, **rows)
    return file


def _own_rows(array: jax.Array) -> np.ndarray:
    """The rows of this process in their order, copies on other devices left out."""
    shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[first]) for first in sorted(shards)])
