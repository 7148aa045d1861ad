# SPDX-License-Identifier: Apache-2.0
"""One run, top to bottom. Each line of ``run`` is a file a newcomer can open."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from m2jax.checkpoint.manager import Checkpoints
from m2jax.checkpoint.parts import Parts
from m2jax.config import Experiment, UserError
from m2jax.config_dual import Architecture, Dual
from m2jax.data.loader import Loader, make_loader
from m2jax.dist.mesh import make_mesh
from m2jax.dist.preemption import Preemption
from m2jax.dist.sharding import batch_sharding
from m2jax.dist.topology import chip_of
from m2jax.obs.goodput import Goodput
from m2jax.obs.metrics import MetricWriter, read_rows
from m2jax.obs.profile import Profiler
from m2jax.obs.progress import Progress
from m2jax.obs.silent import SilentProgress, SilentWriter
from m2jax.obs.watchdog import Watchdog
from m2jax.train import flops
from m2jax.train import origin as origin_lib
from m2jax.train import workdir as workdir_lib
from m2jax.train.dual_text import DualTextTask
from m2jax.train.image_text import ImageTextTask
from m2jax.train.loop import Loop
from m2jax.train.m2_objectives import M2Task
from m2jax.train.meter import Meter
from m2jax.train.origin import Origin
from m2jax.train.scoring import Scoring
from m2jax.train.state import TrainState
from m2jax.train.step import Step, make_step
from m2jax.train.sycoca import SyCoCaTask
from m2jax.train.task import Task
from m2jax.train.visual_tokenizer import TOKENIZER, VisualTokenizerTask, read_tokenizer

PREEMPTED = 42  # exit code of a run that saved and stopped because it was told to


def run(experiment: Experiment, workdir: str | os.PathLike[str]) -> int:
    """Trains, resuming from the newest checkpoint of ``workdir`` if it holds one; then scores.

    Returns:
        The exit code: 0, or 42 when it was told to end, saved and stopped before the last step.

    Raises:
        UserError: anything in the config, the data or the directory that cannot work.
    """
    with workdir_lib.opened(workdir) as (directory, parts):
        origin = origin_lib.adopt(experiment, directory) if experiment.finetune.init else None
        experiment = origin.experiment if origin else experiment
        workdir_lib.prepare(directory, experiment, own=parts is not None)
        return _run(experiment, directory, origin, parts)


def _run(
    experiment: Experiment, directory: Path, origin: Origin | None, parts: Parts | None
) -> int:
    """The run inside its local folder."""
    goodput = Goodput(directory, writes=jax.process_index() == 0)
    profiler = Profiler(experiment.log.profile, directory)
    mesh = make_mesh(experiment.mesh)
    loader = make_loader(experiment, mesh, origin.assets if origin else None)
    model = origin.model if origin else experiment.model
    task, step = assemble(experiment, mesh, model)
    checkpoints = Checkpoints(directory, experiment, loader.assets, model, parts)
    with Watchdog(experiment.train.stall_s) as watchdog:
        scoring = Scoring(experiment, checkpoints.saved, mesh, directory, watchdog.beat)
        with Preemption() as preemption:
            restored = checkpoints.restore(step.abstract_state)
            if restored is None:
                start, state = 0, begin(step, origin, task, mesh, directory)
            else:
                start, state = restored.step, restored.state
                loader.set_state(restored.data)
            workdir_lib.record(directory, experiment)
            goodput.start(start)
            writer, progress = reporters(directory, experiment, start)
            if restored is not None:
                progress.note(f"goes on from step {start}, saved in {directory}")
            loop = Loop(
                *(experiment, step, loader, checkpoints, writer, progress, preemption, watchdog),
                meter=make_meter(experiment, mesh, model, loader, goodput, directory),
                profiler=profiler,
                workdir=directory,
                score=scoring.validation,
            )
            goodput.book("init")
            try:
                result = loop.run(state)
            finally:
                profiler.close()
                loader.close()
                writer.close()
                checkpoints.close()
        if result.preempted:
            progress.note(f"step {result.steps}: preempted after a save; start again to go on")
            return PREEMPTED
        if experiment.eval.suite:  # all is saved: a signal may end the process now
            scoring.final(result.state)
            goodput.book("evaluation")
            goodput.write(experiment.train.steps)
    return 0


def reporters(
    directory: Path, experiment: Experiment, start: int
) -> tuple[MetricWriter | SilentWriter, Progress | SilentProgress]:
    """Where rows and the status line go; one process of a run writes them for all."""
    if jax.process_index() != 0:
        return SilentWriter(), SilentProgress()
    settings = dataclasses.asdict(experiment)
    writer = MetricWriter(directory, start, experiment.log, settings)
    return writer, Progress(experiment.train.steps, start)


def assemble(
    experiment: Experiment, mesh: Mesh, model: Architecture | None = None
) -> tuple[Task, Step]:
    """The task of an experiment and its jitted step: what ``run`` trains and ``plan`` compiles.

    Args:
        experiment: the run.
        mesh: its devices.
        model: the model where it is not ``experiment.model``: that of another family.

    Raises:
        UserError: objectives that the model has no heads for; see the tasks and ``make_step``.
    """
    task = make_task(experiment, mesh, model)
    return task, make_step(experiment, task, mesh)


def make_task(experiment: Experiment, mesh: Mesh, model: Architecture | None = None) -> Task:
    """The task that the weights of an experiment's losses ask for; see ``assemble``."""
    cfg = experiment.loss
    local = ("caption", "masked_image", "masked_text", "masked_tokens", "visual_tokenizer")
    on = [name for name in local if getattr(cfg, name).weight]
    if isinstance(model, Dual):
        if on:
            raise UserError(
                f"{', '.join(f'loss.{name}.weight' for name in on)}: a {model.family} model has no "
                "such heads: set them to 0, or start from an M2-Encoder"
            )
        return DualTextTask(experiment, model, mesh)
    if cfg.visual_tokenizer.weight:
        if others := [name for name in on if name != "visual_tokenizer"]:
            raise UserError(
                f"loss.visual_tokenizer.weight, loss.{others[0]}.weight: a run trains the "
                "tokenizer or tells its tokens: set one of them to 0"
            )
        return VisualTokenizerTask(experiment, mesh)
    if cfg.masked_text.weight or cfg.masked_tokens.weight:
        return M2Task(experiment, mesh)
    return SyCoCaTask(experiment, mesh) if on else ImageTextTask(experiment, mesh)


def batch_shapes(task: Task, experiment: Experiment, mesh: Mesh) -> dict[str, Any]:
    """A batch as shapes with their places."""
    place = batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
        for name, leaf in task.batch_spec(experiment.data.batch_size).items()
    }


def model_flops(experiment: Experiment, mesh: Mesh, model: Architecture | None = None) -> float:
    """FLOPs of a step over all devices that the model needs: what is recomputed does not count."""
    cfg, loss = experiment.model, experiment.loss
    whole = {  # with all logits at once none is made again
        name: dataclasses.replace(getattr(loss, name), positions=2**30)
        for name in ("caption", "masked_image", "masked_text", "masked_tokens")
    }
    plain = dataclasses.replace(
        experiment,
        # A fused kernel hides its products from the trace; the plain form does not.
        model=dataclasses.replace(cfg, remat="none", attention="batch"),
        loss=dataclasses.replace(loss, **whole),
        train=dataclasses.replace(experiment.train, accumulate=1),
    )
    if isinstance(model, Dual):
        model = dataclasses.replace(model, remat="none", attention="batch")
    task, step = assemble(plain, mesh, model)
    traced = step.run.trace(step.abstract_state, batch_shapes(task, plain, mesh))
    return flops.traced(traced.jaxpr)


def make_meter(
    experiment: Experiment,
    mesh: Mesh,
    model: Architecture,
    loader: Loader,
    goodput: Goodput,
    workdir: Path,
) -> Meter:
    """What follows the loop; utilisation is told where the peak of the devices is known."""
    known = chip_of(mesh.devices.flat[0].device_kind) is not None
    rows = read_rows(workdir / "metrics.jsonl")
    return Meter(
        loader,
        goodput,
        list(mesh.devices.flat),
        step_flops=model_flops(experiment, mesh, model) if known else 0.0,
        skipped=int(rows[-1].get("skipped_total", 0)) if rows else 0,
    )


def begin(step: Step, origin: Origin | None, task: Task, mesh: Mesh, workdir: Path) -> TrainState:
    """The state before the first step: fresh, or around the parameters of the run's origin.

    The visual tokenizer of CMIM and TG-MIM is that of another run in both.
    """
    read = None
    if isinstance(task, (M2Task, SyCoCaTask)) and task.tokenizer is not None:
        read = read_tokenizer(task.experiment, task.tokenizer, mesh)
    if origin is None:
        state = step.init()
        return state if read is None else step.begin({**state.params, TOKENIZER: read})
    taken = origin_lib.take(origin, task, mesh)
    origin_lib.remember(origin, workdir)
    if jax.process_index() == 0:
        print(origin_lib.describe(origin, taken))
    return step.begin(taken.params if read is None else {**taken.params, TOKENIZER: read})


def use_cpu_devices(experiment: Experiment) -> None:
    """Splits a CPU host into virtual devices, where the config asks for it.

    On two cores, two devices run every element-wise pass in parallel where one device runs it on
    one core. Must come before the first use of a device; accelerators are not touched.
    """
    if experiment.mesh.cpu_devices:
        jax.config.update("jax_num_cpu_devices", experiment.mesh.cpu_devices)
