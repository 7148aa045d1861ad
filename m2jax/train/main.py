# SPDX-License-Identifier: Apache-2.0
"""One run, top to bottom. Each line of ``run`` is a file a newcomer can open."""

from __future__ import annotations

import os
from pathlib import Path

import jax
from jax.sharding import Mesh

from m2jax import architectures
from m2jax import config as config_lib
from m2jax.bundle import load
from m2jax.checkpoint.manager import Checkpoints
from m2jax.config import Experiment, UserError
from m2jax.data.loader import make_loader
from m2jax.dist.mesh import make_mesh
from m2jax.eval.report import write_report
from m2jax.eval.runner import run_suite, table, write_metrics
from m2jax.obs.metrics import MetricWriter, read_rows
from m2jax.obs.progress import Progress
from m2jax.train.image_text import ImageTextTask
from m2jax.train.loop import Loop
from m2jax.train.step import Step, make_step
from m2jax.train.sycoca import SyCoCaTask
from m2jax.train.task import Task


def run(experiment: Experiment, workdir: str | os.PathLike[str]) -> int:
    """Trains, resuming from the newest checkpoint of ``workdir`` if it holds one; then scores.

    Returns:
        The exit code: 0.

    Raises:
        UserError: anything in the config, the data or the directory that cannot work.
    """
    directory = prepare(Path(workdir), experiment)
    mesh = make_mesh(experiment.mesh)
    loader = make_loader(experiment, mesh)
    _, step = assemble(experiment, mesh)
    checkpoints = Checkpoints(directory, experiment, loader.assets)
    restored = checkpoints.restore(step.abstract_state)
    if restored is None:
        start, state = 0, step.init()
    else:
        start, state = restored.step, restored.state
        loader.set_state(restored.data)
    writer = MetricWriter(directory, start)
    progress = Progress(experiment.train.steps, start)
    loop = Loop(experiment, step, loader, checkpoints, writer, progress)
    try:
        loop.run(state)
    finally:
        loader.close()
        writer.close()
        checkpoints.close()
    if experiment.eval.suite:
        score(directory, experiment)
    return 0


def assemble(experiment: Experiment, mesh: Mesh) -> tuple[Task, Step]:
    """The task of an experiment and its jitted step: what ``run`` trains and ``plan`` compiles."""
    loss = experiment.loss
    local = loss.caption.weight or loss.masked_image.weight
    task = SyCoCaTask(experiment, mesh) if local else ImageTextTask(experiment, mesh)
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


def prepare(workdir: Path, experiment: Experiment) -> Path:
    """Makes the work directory and writes ``config.json``; never over another model's.

    Raises:
        UserError: the directory cannot be made, or belongs to another architecture.
    """
    file = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if file.exists():
            saved = config_lib.from_json(file.read_text(encoding="utf-8"), str(file))
            for key in architectures.SIZES:
                had, want = getattr(saved.model, key), getattr(experiment.model, key)
                if had != want:
                    raise UserError(
                        f"{file}: model.{key} is {had} there and {want} in this run: "
                        "name another --workdir or use that run's config"
                    )
        temporary = workdir / "config.json.tmp"
        temporary.write_text(config_lib.to_json(experiment), encoding="utf-8")
        os.replace(temporary, file)
    except OSError as error:
        raise UserError(
            f"--workdir {workdir}: {error.strerror}: name a directory you may write to"
        ) from error
    return workdir
