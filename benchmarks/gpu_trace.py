# SPDX-License-Identifier: Apache-2.0
"""Where a step's time goes: a profiler trace, by kernel, each against its own roofline.

``jax.profiler`` reads its own traces (``ProfileData``), so nothing of TensorFlow is needed. A
kernel is told from others by the instruction of the compiled program it came from; FLOPs and bytes
of that instruction are ``m2jax plan``'s. Command buffers hide instructions, so this part runs
without them.
"""

import tempfile
from pathlib import Path

import jax
from gpu_clock import Rows, first_line
from gpu_device import compiled_together, memory_limit, wait
from gpu_step import Trainer, prepared, random_batch

from m2jax import config
from m2jax.dist.mesh import make_mesh
from m2jax.plan import flops, hlo, traffic

STEPS, TOP = 3, 10


def kernels_of(folder: Path) -> dict[str, list[float]]:
    """Instruction of the program -> [seconds over all runs, runs], from a trace's device planes.

    Without a GPU the host's planes stand in, so that the reading is tested everywhere.
    """
    file = sorted(folder.rglob("*.xplane.pb"))[-1]
    planes = list(jax.profiler.ProfileData.from_file(str(file)).planes)
    chosen = [plane for plane in planes if plane.name.startswith("/device:GPU")] or planes
    found: dict[str, list[float]] = {}
    for plane in chosen:
        lines = list(plane.lines)
        streams = [line for line in lines if line.name.startswith("Stream")]
        for line in streams or lines:  # other lines of a GPU's plane sum the streams up again
            for event in line.events:
                name = dict(event.stats).get("hlo_op")
                if name is None and not streams:
                    continue
                entry = found.setdefault(str(name or event.name), [0.0, 0])
                entry[0] += event.duration_ns / 1e9
                entry[1] += 1
    return found


def costs_of(text: str) -> dict[str, tuple[float, float, str]]:
    """Instruction -> (FLOPs, bytes moved, what the traced program calls it) of one run."""
    module = hlo.parse(text)
    found = {}
    for computation in module.computations.values():
        for name, one in computation.instructions.items():
            if one.opcode in ("while", "call", "conditional", "parameter"):
                continue
            try:
                work = flops.instruction_flops(module, computation, one)
                moved = traffic.moved(module, computation, one)
            except (hlo.HloError, KeyError, IndexError, ValueError):
                continue  # of an instruction inside another's computation: no kernel is named so
            found[name] = (work, moved, one.op_name or one.opcode)
    return found


def table(kernels: dict[str, list[float]], costs: dict[str, tuple], steps: int) -> list[dict]:
    """The kernels with most time, the rest in one line; seconds are of one step."""
    total = sum(seconds for seconds, _ in kernels.values())
    ordered = sorted(kernels.items(), key=lambda item: -item[1][0])
    made = []
    for name, (seconds, runs) in ordered[:TOP]:
        work, moved, origin = costs.get(name, (0.0, 0.0, ""))
        made.append(
            {
                "kernel": name,
                "origin": "/".join(origin.split("/")[-3:]),
                "seconds": seconds / steps,
                "runs": runs / steps,
                "share": seconds / total if total else 0.0,
                "flops": work * runs / steps,
                "moved": moved * runs / steps,
            }
        )
    rest = sum(seconds for _, (seconds, _) in ordered[TOP:])
    if rest:
        made.append(
            {"kernel": f"{len(ordered) - TOP} others", "seconds": rest / steps,
             "share": rest / total}
        )  # fmt: skip
    return made


def traces(cases: list[dict], rows: Rows, smoke: bool) -> None:
    """A table per case; its rows carry the case."""
    mesh, memory = make_mesh(config.Mesh(), jax.devices()[:1]), memory_limit()
    for case in cases:
        rows.attempt(case, lambda case=case: _traced(case, mesh, memory, smoke))


def _traced(case: dict, mesh, memory: float, smoke: bool) -> dict:
    """Kernels with their times, and where the program's text was not understood, why."""
    variant = prepared(case, smoke, mesh, memory)
    (program, _), trainer = compiled_together([variant.lowered])[0], Trainer()
    if isinstance(program, Exception):
        raise program
    batch, state = random_batch(variant.shapes), trainer.of(variant)
    state, metrics = program(state, batch)
    wait(metrics)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(STEPS):
                state, metrics = program(state, batch)
            wait((state, metrics))
        kernels = kernels_of(Path(folder))
    try:
        return {"kernels": table(kernels, costs_of(program.as_text()), STEPS)}
    except hlo.HloError as error:  # the times are good without
        return {"kernels": table(kernels, {}, STEPS), "unread": first_line(error)}
