# SPDX-License-Identifier: Apache-2.0
"""One run, top to bottom. Each line of ``run`` is a file a newcomer can open."""

from __future__ import annotations

import os
from pathlib import Path

import jax
from jax.sharding import Mesh

from m2jax.bundle import load
from m2jax.checkpoint.manager import Checkpoints
from m2jax.config import Experiment
from m2jax.data.loader import make_loader
from m2jax.dist.mesh import make_mesh
from m2jax.dist.preemption import Preemption
from m2jax.eval.report import write_report
from m2jax.eval.runner import run_suite, table, write_metrics
from m2jax.obs.metrics import MetricWriter, read_rows
from m2jax.obs.progress import Progress
from m2jax.obs.silent import SilentProgress, SilentWriter
from m2jax.obs.watchdog import Watchdog
from m2jax.train import workdir as workdir_lib
from m2jax.train.image_text import ImageTextTask
from m2jax.train.loop import Loop
from m2jax.train.step import Step, make_step
from m2jax.train.task import Task

PREEMPTED = 42  # exit code of a run that saved and stopped because it was told to


def run(experiment: Experiment, workdir: str | os.PathLike[str]) -> int:
    """Trains, resuming from the newest checkpoint of ``workdir`` if it holds one; then scores.

    Returns:
        The exit code: 0, or 42 when it was told to end, saved and stopped before the last step.

    Raises:
        UserError: anything in the config, the data or the directory that cannot work.
    """
    with workdir_lib.opened(workdir, experiment) as directory:
        return _run(experiment, directory)


def _run(experiment: Experiment, directory: Path) -> int:
    """The run inside its local folder."""
    mesh = make_mesh(experiment.mesh)
    loader = make_loader(experiment, mesh)
    _, step = assemble(experiment, mesh)
    checkpoints = Checkpoints(directory, experiment, loader.assets)
    with Preemption() as preemption, Watchdog(experiment.train.stall_s) as watchdog:
        restored = checkpoints.restore(step.abstract_state)
        if restored is None:
            start, state = 0, step.init()
        else:
            start, state = restored.step, restored.state
            loader.set_state(restored.data)
        writer, progress = reporters(directory, experiment, start)
        loop = Loop(experiment, step, loader, checkpoints, writer, progress, preemption, watchdog)
        try:
            result = loop.run(state)
        finally:
            loader.close()
            writer.close()
            checkpoints.close()
    if result.preempted:
        progress.note(f"step {result.steps}: preempted after a save; start again to go on")
        return PREEMPTED
    if experiment.eval.suite and jax.process_index() == 0:
        score(directory, experiment)
    return 0


def reporters(
    directory: Path, experiment: Experiment, start: int
) -> tuple[MetricWriter | SilentWriter, Progress | SilentProgress]:
    """Where rows and the status line go; one process of a run writes them for all."""
    if jax.process_index() != 0:
        return SilentWriter(), SilentProgress()
    return MetricWriter(directory, start), Progress(experiment.train.steps, start)


def assemble(experiment: Experiment, mesh: Mesh) -> tuple[Task, Step]:
    """The task of an experiment and its jitted step: what ``run`` trains and ``plan`` compiles."""
    task = ImageTextTask(experiment, mesh)
    return task, make_step(experiment, task, mesh)


def score(workdir: Path, experiment: Experiment) -> None:
    """Scores the newest checkpoint and leaves ``metrics.json`` and ``report.html``."""
    evaluation = run_suite(
        load(workdir),
        suite=experiment.eval.suite,
        data_dir=experiment.data.dir,
        languages=experiment.data.languages,
        batch_size=experiment.eval.batch_size,
        hold_out_styles=experiment.data.hold_out_styles,
    )
    rows = read_rows(workdir / "metrics.jsonl")
    seconds = rows[-1].get("seconds", 0.0) if rows else 0.0
    metrics = {**evaluation.metrics, "train/seconds": seconds}
    write_metrics(workdir / "metrics.json", metrics)
    write_report(workdir, metrics, evaluation.scored)
    print(table(metrics))
    print(f"report: {workdir / 'report.html'}")


def use_cpu_devices(experiment: Experiment) -> None:
    """Splits a CPU host into virtual devices, where the config asks for it.

    On two cores, two devices run every element-wise pass in parallel where one device runs it on
    one core. Must come before the first use of a device; accelerators are not touched.
    """
    if experiment.mesh.cpu_devices:
        jax.config.update("jax_num_cpu_devices", experiment.mesh.cpu_devices)
