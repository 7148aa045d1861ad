# SPDX-License-Identifier: Apache-2.0
"""The training step of the library itself on one card, in the variants of benchmarks/gpu.py."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from gpu_clock import Rows, measure, rows_for
from gpu_device import compiled_together, memory_limit, space, traced, wait

from m2jax import config
from m2jax.dist.mesh import make_mesh
from m2jax.dist.sharding import batch_sharding
from m2jax.models.params import count
from m2jax.plan import flops as flops_of_plan
from m2jax.train import flops
from m2jax.train.image_text import ImageTextTask
from m2jax.train.step import make_step
from m2jax.train.sycoca import SyCoCaTask

NAMES = {"0.4b": "m2-encoder-0.4b", "1b": "m2-encoder-1b", "10b": "m2-encoder-10b"}
TINY = {
    "width": 64, "heads": 2, "backbone_layers": 2, "vl_layers": 1, "out_dim": 32,
    "image_size": 32, "patch_size": 8, "vocab_size": 300, "max_text_len": 12,
}  # fmt: skip
TINY_ROWS = 8
SECONDS = 2.5  # of timing, per variant
# Bytes per parameter in training: float32 weight, two moments, gradient.
STATE_BYTES = 16
STATE_SHARE = 0.62  # of the memory, that a slice of the 10B model may take for its state
KNOBS = ("remat", "attention", "unroll", "fused_qkv", "dtype", "param_dtype", "products")


def slice_layers(memory: float) -> int:
    """Backbone layers of the 10B model, at full width, whose training state fits a card.

    A layer has weights of both ways, A and B, of 12 width^2 each; embeddings and the 3 vl layers
    come with any slice.
    """
    sizes = config.resolve(config.Model(name=NAMES["10b"]))
    layer = 2 * 12 * sizes.width**2
    fixed = 117_000 * sizes.width + sizes.vl_layers * layer
    return max(1, int((STATE_SHARE * memory / STATE_BYTES - fixed) // layer))


def model_of(case: dict, smoke: bool, memory: float = 16e9) -> config.Model:
    """The encoder that a case names."""
    knobs = {key: case[key] for key in KNOBS if key in case}
    if smoke:
        sizes = TINY
        if knobs.get("attention") == "cudnn":
            knobs["attention"] = "xla"  # a smoke run has no GPU
    elif case["size"] == "10b-slice":
        sizes = {"name": NAMES["10b"], "backbone_layers": slice_layers(memory)}
    else:
        sizes = {"name": NAMES[case["size"]]}
    made = config.resolve(config.Model(**{**sizes, **knobs}))
    depth = made.backbone_layers + made.vl_layers
    return dataclasses.replace(made, unroll=min(made.unroll, depth))


def experiment_of(case: dict, smoke: bool, memory: float = 16e9) -> config.Experiment:
    """The run that a case names: one caption a picture, AdamW, clipped gradients."""
    loss = config.Loss()
    if case.get("objectives", "itc") != "itc":
        loss = config.Loss(
            caption=config.Caption(weight=2.0), masked_image=config.MaskedImage(weight=1.0)
        )
    rows = TINY_ROWS if smoke else rows_for(case, memory)
    return config.Experiment(
        model=model_of(case, smoke, memory),
        data=config.Data(batch_size=rows, languages=("en",)),
        loss=loss,
    )


def task_of(experiment: config.Experiment, mesh):
    """What ``m2jax train`` would train; the two tasks that need no data libraries."""
    local = experiment.loss.caption.weight or experiment.loss.masked_image.weight
    return (SyCoCaTask if local else ImageTextTask)(experiment, mesh)


def shapes_of(task, experiment: config.Experiment, mesh) -> dict:
    """A batch as shapes with their places."""
    return {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=batch_sharding(mesh))
        for name, leaf in task.batch_spec(experiment.data.batch_size).items()
    }


@functools.lru_cache(maxsize=64)
def model_flops(experiment: config.Experiment) -> float:
    """FLOPs that the model needs for a step, by the library's counter; see ``train.main``.

    Nothing recomputed, attention where the counter sees it, all logits at once.
    """
    loss, plain = experiment.loss, {"remat": "none", "attention": "batch", "products": ""}
    whole = dataclasses.replace(loss.caption, positions=2**30)
    experiment = dataclasses.replace(
        experiment,
        model=dataclasses.replace(experiment.model, **plain),
        loss=dataclasses.replace(loss, caption=whole),
    )
    mesh = make_mesh(config.Mesh(), jax.devices()[:1])
    task = task_of(experiment, mesh)
    step = make_step(experiment, task, mesh)
    program = step.run.trace(step.abstract_state, shapes_of(task, experiment, mesh))
    return flops.traced(program.jaxpr)


class Variant(NamedTuple):
    """One case, ready to be compiled."""

    case: dict
    experiment: config.Experiment
    step: object
    shapes: dict
    lowered: object  # or the error that tracing it raised


def prepared(case: dict, smoke: bool, mesh, memory: float) -> Variant:
    """Traces and lowers; nothing is compiled."""
    try:
        experiment = experiment_of(case, smoke, memory)
        task = task_of(experiment, mesh)
        step = make_step(experiment, task, mesh)
    except config.UserError as error:
        return Variant(case, None, None, {}, error)
    shapes = shapes_of(task, experiment, mesh)
    return Variant(case, experiment, step, shapes, traced(step.run, step.abstract_state, shapes))


def random_batch(shapes: dict, seed: int = 0) -> dict:
    """Random numbers in the shapes of a batch, on the device; texts of 8 tokens and more."""
    rng, made = np.random.default_rng(seed), {}
    for name, leaf in shapes.items():
        if leaf.dtype == jnp.bool_:
            lengths = rng.integers(min(8, leaf.shape[-1]), leaf.shape[-1] + 1, leaf.shape[:-1])
            values = np.arange(leaf.shape[-1]) < lengths[..., None]
        else:
            values = rng.integers(0, 256 if leaf.dtype == jnp.uint8 else 250, leaf.shape)
        made[name] = jax.device_put(values.astype(leaf.dtype), leaf.sharding)
    return made


class Trainer:
    """The state of one model, kept from variant to variant: they differ in the program alone."""

    def __init__(self):
        self.state = self.shapes = None

    def of(self, variant: Variant):
        """The state of a variant; a fresh one where the last is of other shapes, or was lost."""
        shapes = jax.tree.map(lambda x: (x.shape, x.dtype), variant.step.abstract_state)
        gone = self.state is None or any(x.is_deleted() for x in jax.tree.leaves(self.state))
        if gone or shapes != self.shapes:
            self.state = None  # before the next one is made: two may not fit
            self.state, self.shapes = variant.step.init(), shapes
        return self.state

    def time(self, variant: Variant, program, seconds: float) -> dict:
        """Seconds of a step, donating the state as the training loop does."""
        batch = random_batch(variant.shapes)
        self.of(variant)

        def call():
            self.state, metrics = program(self.state, batch)
            return metrics

        metrics = call()
        wait(metrics)
        found = measure(call, wait, seconds)
        return {**found, "loss": float(metrics["loss"]), "skipped": int(metrics["skipped"])}


def steps(cases: list[dict], rows: Rows, smoke: bool) -> None:
    """Compiles every case, then times each."""
    mesh = make_mesh(config.Mesh(), jax.devices()[:1])
    memory, trainer = memory_limit(), Trainer()
    variants = [prepared(case, smoke, mesh, memory) for case in cases]
    programs = compiled_together([variant.lowered for variant in variants])
    for variant, (program, seconds) in zip(variants, programs, strict=True):
        rows.attempt(
            variant.case,
            lambda v=variant, p=program, s=seconds: _timed(v, p, s, trainer, memory, smoke),
        )


def _timed(
    variant: Variant, program, compile_seconds: float, trainer: Trainer, memory: float, smoke: bool
) -> dict:
    """The row of one variant."""
    if isinstance(program, Exception):
        raise program
    needs = space(program)
    if needs.get("bytes", 0) > memory:
        raise MemoryError(f"does not fit: {needs['bytes'] / 1e9:.0f} GB of {memory / 1e9:.0f}")
    found = trainer.time(variant, program, 0.2 if smoke else SECONDS)
    return {
        **facts(variant.experiment),
        **needs,
        **found,
        "model_flops": model_flops(variant.experiment),
        "compile_seconds": compile_seconds,
    }


def facts(experiment: config.Experiment) -> dict:
    """Rows, layers and parameters, and what the rule of thumb gives for the FLOPs."""
    mesh = make_mesh(config.Mesh(), jax.devices()[:1])
    task, cfg = task_of(experiment, mesh), experiment.model
    return {
        "rows": experiment.data.batch_size,
        "layers": cfg.backbone_layers + cfg.vl_layers,
        "parameters": count(task.model.params),
        "sized_flops": flops_of_plan.from_sizes(experiment, task.model),
    }
