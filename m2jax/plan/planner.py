# SPDX-License-Identifier: Apache-2.0
"""``plan``: does a run fit a machine, what does it send, how fast can it be. Nothing runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from m2jax.config import Experiment, UserError
from m2jax.dist.topology import Topology, describe
from m2jax.plan import collectives as collectives_lib
from m2jax.plan import contrast, flops, hlo, loops, schedule, traffic
from m2jax.plan.collectives import Collective
from m2jax.plan.compile import Compiled, Memory, compile_step, silent
from m2jax.plan.contrast import Cost
from m2jax.plan.hot import Hot, hottest
from m2jax.plan.schedule import Times


class Checks(NamedTuple):
    """Ratios that show whether the counting can be trusted; each says what 1 means."""

    compiled_to_traced: float  # FLOPs of the compiled loops / of the traced scans
    traced_to_sizes: float  # FLOPs of the trace without recomputation / 6 x parameters x tokens
    compute_to_floor: float  # compute seconds / (FLOPs / peak): below 1 is impossible


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """One experiment on one machine; per device unless it says otherwise."""

    topology: Topology
    mesh: dict[str, int]
    batch_size: int  # global
    memory: Memory
    compile_seconds: float
    flops: float = 0.0  # recomputation included
    model_flops: float = 0.0  # what the model needs
    memory_bytes: float = 0.0  # moved to and from main memory
    collectives: tuple[Collective, ...] = ()
    contrastive: tuple[Cost, ...] = ()  # each form of the loss, compiled alone, where asked for
    times: Times | None = None  # None where the step does not fit
    checks: Checks | None = None
    hot: tuple[Hot, ...] = ()  # where the compute goes, most first

    @property
    def chips(self) -> int:
        """Devices of the machine."""
        return len(self.topology.devices)

    @property
    def fits(self) -> bool:
        """Whether the step fits: the heap's gaps count, which libtpu's own check leaves out."""
        return self.times is not None and self.memory.total <= self.topology.chip.memory

    @property
    def sent(self) -> float:
        """Bytes a device sends in a step."""
        return sum(one.sent * one.times for one in self.collectives)

    @property
    def mfu(self) -> float:
        """Model-FLOPs utilisation: recomputation does not count as work."""
        return self._share(self.times.total) if self.times else 0.0

    @property
    def mfu_compute_only(self) -> float:
        """The same with free communication."""
        return self._share(self.times.compute) if self.times else 0.0

    @property
    def intensity(self) -> float:
        """FLOPs per byte to and from main memory."""
        return self.flops / self.memory_bytes if self.memory_bytes else 0.0

    @property
    def bound(self) -> str:
        """What the step cannot beat even with perfect overlap: the longest of three times.

        Arithmetic at the chip's peak, main memory at its rate, collectives at the links' rate; ""
        where the step does not fit.
        """
        if self.times is None:
            return ""
        seconds = {
            "compute": self.times.floor,
            "main memory": self.memory_bytes / self.topology.chip.memory_rate,
            "links": self.times.communication,
        }
        return max(seconds, key=seconds.__getitem__)

    def _share(self, seconds: float) -> float:
        return self.model_flops / (self.topology.chip.peak_flops * seconds)


def plan(
    experiment: Experiment,
    topology: str | Topology,
    *,
    contrastive: bool = False,
    say: Callable[[str], None] = silent,
) -> Plan:
    """Compiles the training step of an experiment for a machine and accounts for it.

    Args:
        experiment: the run.
        topology: a name as ``dist.topology.describe`` takes it, or what that returned.
        contrastive: also compile every form of the contrastive loss alone.
        say: told what takes long, when it begins.

    Raises:
        UserError: no such machine, or a mesh or batch that does not fit its devices.
        HloError: the program holds what the accounting does not understand, or a self-check fails.
    """
    machine = describe(topology) if isinstance(topology, str) else topology
    compiled = compile_step(experiment, machine, say)
    # Programs number devices in the order of the mesh.
    machine = machine._replace(devices=tuple(compiled.mesh.devices.flat))
    costs: tuple[Cost, ...] = ()
    if contrastive:
        say("compiling each form of the contrastive loss alone")
        costs = tuple(contrast.costs(experiment, machine, compiled.mesh))
    result = Plan(
        topology=machine,
        mesh=dict(compiled.mesh.shape),
        batch_size=experiment.data.batch_size,
        memory=compiled.memory,
        compile_seconds=compiled.seconds,
        model_flops=compiled.model_flops / len(machine.devices),
        contrastive=costs,
    )
    if not compiled.text:
        return result
    # Muon's products of whole matrices are made by every device.
    copies = len(machine.devices) if experiment.optim.name == "muon" else result.mesh["model"]
    return _account(result, compiled, copies=copies)


def _account(result: Plan, compiled: Compiled, *, copies: int = 1) -> Plan:
    """Counts FLOPs, bytes and seconds of a compiled program, and checks the counting."""
    module = hlo.parse(compiled.text)
    visits = list(loops.walk(module))
    found = collectives_lib.collectives(visits, result.topology, result.mesh)
    missed = collectives_lib.in_text(module) - set(found)
    if missed:
        raise hlo.HloError(f"collectives that no loop or call reaches: {sorted(missed)[:3]}")
    counted, at_peak = flops.of_program(module, visits, result.topology.chip)
    times = schedule.play(module, result.topology.chip, found, at_peak)
    checks = Checks(
        counted * result.chips / compiled.traced_flops,
        compiled.model_flops / compiled.sized_flops,
        times.compute / times.floor,
    )
    check(checks, copies=copies)
    waits = schedule.waits(module, result.topology.chip, found)
    return dataclasses.replace(
        result,
        flops=counted,
        memory_bytes=sum(
            traffic.moved(module, visit.computation, visit.instruction) * visit.times
            for visit in visits
            if not visit.inside
        ),
        collectives=tuple(
            dataclasses.replace(one, waited=waits.get(name, 0.0)) for name, one in found.items()
        ),
        times=times,
        checks=checks,
        hot=tuple(hottest(module, visits, result.topology.chip, found)),
    )


def check(checks: Checks, *, copies: int = 1) -> None:
    """Refuses numbers that cannot be right.

    Args:
        checks: the ratios.
        copies: devices that may do the same work.

    Raises:
        HloError: the compiled program does much less or more than the trace (a loop's trips
            miscounted), the trace less than the model's sizes need, or the schedule beats the
            hardware.
    """
    if not 0.7 < checks.compiled_to_traced < 1.3 * copies:
        raise hlo.HloError(
            f"the compiled step has {checks.compiled_to_traced:.2f} of the traced one's FLOPs: "
            "a loop was miscounted"
        )
    if checks.traced_to_sizes < 0.98:
        raise hlo.HloError(
            f"the traced step has {checks.traced_to_sizes:.2f} of 6 x parameters x tokens FLOPs: "
            "a scan was miscounted"
        )
    if checks.compute_to_floor < 0.999:
        raise hlo.HloError(
            f"compute takes {checks.compute_to_floor:.2f} of FLOPs / peak: estimates are missing"
        )


def variants(words: list[str]) -> list[list[str]]:
    """Overrides of each column of a comparison: ``mesh.fsdp=8,mesh.model=2`` is one column.

    Raises:
        UserError: a word that sets nothing.
    """
    columns = []
    for word in words:
        parts: list[str] = []
        for part in (piece.strip() for piece in word.split(",")):
            if "=" in part:
                parts.append(part)
            elif parts:  # a value with a comma in it
                parts[-1] += "," + part
            else:
                raise UserError(f"--compare {word}: no KEY=VALUE: write mesh.fsdp=8,mesh.model=2")
        columns.append(parts)
    return columns


def as_json(one: Plan) -> dict[str, Any]:
    """The plan for machines; the keys are a promise (seconds, bytes, FLOPs, shares)."""
    totals: dict[tuple[str, str], list[float]] = {}
    for c in one.collectives:
        entry = totals.setdefault((c.kind, c.axis), [0.0, 0, 0.0, 0.0])
        entry[0] += c.sent * c.times
        entry[1] += c.times
        entry[2] += c.seconds * c.times
        entry[3] += c.waited
    return {
        "fits": one.fits,
        "topology": one.topology.name,
        "chips": one.chips,
        "mesh": one.mesh,
        "batch_size": one.batch_size,
        "bytes_per_chip": {**one.memory._asdict(), "limit": int(one.topology.chip.memory)},
        "flops_per_chip": one.flops,
        "model_flops_per_chip": one.model_flops,
        "memory_bytes_per_chip": one.memory_bytes,
        "collectives": [
            {
                "kind": kind,
                "axis": axis,
                "bytes": sent,
                "times": times,
                "seconds": seconds,
                "not_hidden_seconds": waited,
            }
            for (kind, axis), (sent, times, seconds, waited) in sorted(totals.items())
        ],
        "sent_bytes_per_chip": one.sent,
        "step_seconds": one.times.total if one.times else None,
        "seconds": one.times._asdict() if one.times else None,
        "bound": one.bound,
        "flops_per_byte": one.intensity if one.times else None,
        "ridge_flops_per_byte": one.topology.chip.ridge,
        "mfu": one.mfu if one.times else None,
        "mfu_compute_only": one.mfu_compute_only if one.times else None,
        "checks": one.checks._asdict() if one.checks else None,
        "hot": [hot._asdict() for hot in one.hot[:30]],
        "contrastive": [cost._asdict() for cost in one.contrastive],
        "compile_seconds": one.compile_seconds,
    }
