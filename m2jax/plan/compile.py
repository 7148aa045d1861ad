# SPDX-License-Identifier: Apache-2.0
"""Compiles the training step, the one ``m2jax train`` runs, for a machine that is not here."""

from __future__ import annotations

import math
import re
import time
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from m2jax.config import Experiment, UserError
from m2jax.dist.mesh import make_mesh
from m2jax.dist.sharding import batch_shards
from m2jax.dist.topology import Topology, uncached
from m2jax.plan import flops
from m2jax.train.main import assemble, batch_shapes, model_flops
from m2jax.train.step import Step
from m2jax.train.task import Task

# XLA picks Triton's tiles for a product by timing them, which needs the GPU; cuBLAS needs no tiles.
# A real run may take either, per product: memory and bytes are alike, and times are a roofline.
OPTIONS: Mapping[str, dict[str, Any]] = types.MappingProxyType(
    {"tpu": {}, "cuda": {"xla_gpu_enable_triton_gemm": False}}
)


class Memory(NamedTuple):
    """Bytes on one device."""

    parameters: int
    optimizer: int
    temporaries: int
    total: int
    peak: int = 0  # by the compiler's own count, which leaves gaps out; 0 where it does not fit


class Compiled(NamedTuple):
    """A step as the compiler left it."""

    mesh: Mesh
    memory: Memory
    text: str  # optimised HLO; "" where the step did not fit
    traced_flops: float  # over all devices, recomputation included
    model_flops: float  # the same step with nothing recomputed
    sized_flops: float  # by the rule of thumb from the model's sizes
    seconds: float  # the compiler took


def lay_out(experiment: Experiment, topology: Topology) -> tuple[Mesh, Task, Step]:
    """Mesh, task and step of an experiment on a machine; nothing is compiled.

    Raises:
        UserError: the mesh does not take the machine's devices, or the batch does not divide.
    """
    try:
        mesh = make_mesh(experiment.mesh, topology.devices)
    except UserError as error:
        raise UserError(f"--topology {topology.name}: {error}") from None
    rows = batch_shards(mesh.shape)
    if experiment.data.batch_size % rows:
        raise UserError(
            f"data.batch_size={experiment.data.batch_size}: does not divide over {rows} devices of "
            f"{topology.name}: make it a multiple"
        )
    task, step = assemble(experiment, mesh)
    return mesh, task, step


def silent(text: str) -> None:
    """Says nothing: what ``say`` is where nobody watches."""


def compile_step(
    experiment: Experiment, topology: Topology, say: Callable[[str], None] = silent
) -> Compiled:
    """Traces, lowers and compiles; arrays are shapes throughout.

    Args:
        experiment: the run.
        topology: the machine.
        say: told what takes long, when it begins.

    Raises:
        UserError: as ``lay_out``.
    """
    mesh, task, step = lay_out(experiment, topology)
    traced = step.run.trace(step.abstract_state, batch_shapes(task, experiment, mesh))
    state = step.abstract_state
    parts = {"parameters": _bytes(state.params), "optimizer": _bytes(state.opt_state)}
    start = time.monotonic()
    say(f"compiling the step for {topology.name}, {experiment.data.batch_size:,} rows")
    try:
        with uncached():
            compiled = traced.lower().compile(OPTIONS[topology.chip.platform])
    except jax.errors.JaxRuntimeError as error:
        used = out_of_memory(str(error))
        if used is None:
            raise
        memory, text = (
            Memory(**parts, temporaries=max(used - sum(parts.values()), 0), total=used),
            "",
        )
    else:
        memory, text = _memory(compiled.memory_analysis(), parts), compiled.as_text() or ""
    return Compiled(
        mesh=mesh,
        memory=memory,
        text=text,
        traced_flops=flops.traced(traced.jaxpr),
        model_flops=model_flops(experiment, mesh),
        sized_flops=flops.from_sizes(experiment, task.model),
        seconds=time.monotonic() - start,
    )


def _bytes(tree: Any) -> int:
    """Bytes of the shards of one device."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape)
        total += leaf.dtype.itemsize * math.prod(shape)
    return total


def _memory(analysis: Any, parts: dict[str, int]) -> Memory:
    """What the program holds at once: arguments, results that reuse none, temporaries and code.

    The heap of temporaries counts with its gaps, up to a third of it, which libtpu's own check
    (``peak_memory_in_bytes`` against the chip) leaves out: what fits here fits there.
    """
    arguments = analysis.argument_size_in_bytes
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    temporaries = analysis.temp_size_in_bytes + analysis.generated_code_size_in_bytes
    total, peak = arguments + results + temporaries, analysis.peak_memory_in_bytes
    return Memory(**parts, temporaries=temporaries, total=total, peak=peak)


_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "": 1}


def out_of_memory(message: str) -> int | None:
    """Bytes a refused program wanted, from the compiler's message; ``None`` if that says other."""
    found = re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", message)
    found = found or re.search(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM", message)
    return int(float(found[1]) * _UNITS[found[2]]) if found else None
