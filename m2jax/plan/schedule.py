# SPDX-License-Identifier: Apache-2.0
"""How long a step takes by a stated model: the compiler's schedule, played back.

Instructions run one after the other as scheduled. One takes the compiler's own cycle estimate, or
where it gives none (kernels, GPUs) the larger of FLOPs / peak and bytes / memory rate. Collectives
run beside compute only between the start and the done that the compiler wrote; one at a time, at
the full rate of the links they span. Left out: latency of collectives and launches, stragglers,
contention between collectives and memory traffic, host work and input.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from m2jax.dist.topology import Chip
from m2jax.plan import flops, hlo, loops, traffic
from m2jax.plan.collectives import Collective, kind_of

NO_ESTIMATE = 2**40  # cycles; libtpu writes numbers near 2^63 where it has no estimate


class Times(NamedTuple):
    """Seconds of a step on one device."""

    total: float
    compute: float  # everything but waiting for collectives
    communication: float  # of all collectives, whether or not compute hides them
    floor: float  # FLOPs / peak, of 8-bit products at theirs: no schedule is faster
    unestimated: float  # of ``compute``, what the roofline stands in for cycles


def play(
    module: hlo.Module, chip: Chip, collectives: dict[str, Collective], at_peak: float
) -> Times:
    """Plays a scheduled program once.

    Args:
        module: the compiled program.
        chip: what it runs on.
        collectives: by instruction name.
        at_peak: seconds that the program's FLOPs take one device at its peak.
    """
    player = _Player(module, chip, collectives)
    result = player.computation(module.entry)
    return result._replace(floor=at_peak)


class _Player:
    def __init__(self, module: hlo.Module, chip: Chip, collectives: dict[str, Collective]):
        self.module, self.chip, self.collectives = module, chip, collectives
        self.known: dict[str, Times] = {}
        self.trips = loops.trip_counts(module)

    def computation(self, name: str) -> Times:
        """One run of a computation."""
        if name not in self.known:
            self.known[name] = self._play(self.module.computations[name])
        return self.known[name]

    def _play(self, computation: hlo.Computation) -> Times:
        now = busy_until = 0.0  # of the device, of its links
        ends: dict[str, float] = {}  # of what was started, by the name of its start
        compute = communication = unestimated = 0.0
        for instruction in computation.instructions.values():
            collective = self._collective(instruction)
            if collective is not None:
                own = self._beside(computation, instruction)
                busy_until = max(now, busy_until) + collective.seconds
                communication += collective.seconds
                compute += own
                if instruction.opcode.endswith("-start"):
                    ends[instruction.name] = busy_until
                else:
                    now = max(now + own, busy_until)
            elif instruction.opcode == "async-update":
                ends[instruction.name] = ends.get(instruction.operands[0], 0.0)
            elif instruction.opcode.endswith("-done"):
                now = max(now, ends.get(instruction.operands[0], 0.0))
            elif instruction.opcode in ("while", "call", "conditional"):
                inner = self._inner(instruction)
                now = max(now, busy_until if inner.communication else 0.0) + inner.total
                compute += inner.compute
                communication += inner.communication
                unestimated += inner.unestimated
            else:
                seconds, estimated = seconds_of(self.module, computation, instruction, self.chip)
                now += seconds
                compute += seconds
                unestimated += 0.0 if estimated else seconds
        return Times(now, compute, communication, 0.0, unestimated)

    def _inner(self, instruction: hlo.Instruction) -> Times:
        """A loop's body times its trips, a call once, the longest branch of a conditional."""
        called = [
            self.computation(name) for role, name in instruction.called if role != "condition"
        ]
        if instruction.opcode == "while":
            trips = self.trips[instruction.name]
            return Times(*(trips * value for value in called[0]))
        return max(called)

    def _collective(self, instruction: hlo.Instruction) -> Collective | None:
        """The collective an instruction is or starts, also where a fusion or call wraps it.

        Of several that are wrapped together one follows the other.
        """
        found = self.collectives.get(instruction.name)
        if found or instruction.opcode not in ("fusion", "async-start", "call-start"):
            return found
        wrapped = [
            self.collectives[inner.name]
            for _, name in instruction.called
            for inner in self.module.computations[name].instructions.values()
            if kind_of(inner, name)
        ]
        if not wrapped:
            return None
        seconds = sum(one.seconds for one in wrapped)
        return dataclasses.replace(wrapped[0], sent=seconds * wrapped[0].rate)

    def _beside(self, computation: hlo.Computation, instruction: hlo.Instruction) -> float:
        """Compute of a collective: where the compiler fused it with a product, they run at once."""
        if not flops.instruction_flops(self.module, computation, instruction):
            return 0.0
        return seconds_of(self.module, computation, instruction, self.chip)[0]


def seconds_of(
    module: hlo.Module, computation: hlo.Computation, instruction: hlo.Instruction, chip: Chip
) -> tuple[float, bool]:
    """Duration of one run of an instruction, and whether the compiler estimated it."""
    if instruction.opcode in FREE:
        return 0.0, True
    cycles = instruction.cycles
    if cycles is not None and cycles < NO_ESTIMATE and chip.clock:
        return cycles / chip.clock, True
    work = flops.instruction_flops(module, computation, instruction)
    moved = traffic.moved(module, computation, instruction)
    return max(work / chip.peak_flops, moved / chip.memory_rate), False


FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "opt-barrier", "copy-start", "copy-done", "slice-start", "slice-done",
    "async-start", "async-done", "async-update", "call-start", "call-done", "domain", "iota",
}  # fmt: skip
