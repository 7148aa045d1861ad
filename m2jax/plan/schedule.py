# SPDX-License-Identifier: Apache-2.0
"""How long a step takes by a stated model: the compiler's schedule, played back.

Instructions run one after the other as scheduled. One takes the compiler's own cycle estimate, or
where it gives none (kernels, GPUs) the larger of FLOPs / peak and bytes / memory rate. Collectives
run beside compute only between the start and the done that the compiler wrote; one at a time, at
the full rate of the links they span. Left out: latency of collectives and launches, stragglers,
contention between collectives and memory traffic, host work and input.
"""

from __future__ import annotations

import collections
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


def waits(module: hlo.Module, chip: Chip, collectives: dict[str, Collective]) -> dict[str, float]:
    """Seconds of a step that the device waits for each collective: what no compute hides.

    They add up to ``Times.total`` - ``Times.compute``. A wait goes to the collective that is waited
    for, also where the links were still busy with an earlier one.

    Args:
        module: the compiled program.
        chip: what it runs on.
        collectives: by instruction name.
    """
    player = _Player(module, chip, collectives)
    player.computation(module.entry)
    return player.waited[module.entry]


class _Player:
    def __init__(self, module: hlo.Module, chip: Chip, collectives: dict[str, Collective]):
        self.module, self.chip, self.collectives = module, chip, collectives
        self.known: dict[str, Times] = {}
        self.waited: dict[str, dict[str, float]] = {}  # in one run of a computation
        self.trips = loops.trip_counts(module)

    def computation(self, name: str) -> Times:
        """One run of a computation."""
        if name not in self.known:
            self.waited[name] = collections.defaultdict(float)
            self.known[name] = self._play(self.module.computations[name], self.waited[name])
        return self.known[name]

    def _play(self, computation: hlo.Computation, waited: dict[str, float]) -> Times:
        now = busy_until = 0.0  # of the device, of its links
        running: dict[str, tuple[float, list[Collective]]] = {}  # by the name of its start
        last: list[Collective] = []  # what the links were given last
        compute = communication = unestimated = 0.0

        def wait(until: float, whose: list[Collective]) -> None:
            nonlocal now
            all_of_them = sum(one.seconds for one in whose)
            for one in whose if until > now and all_of_them else ():
                waited[one.name] += (until - now) * one.seconds / all_of_them
            now = max(now, until)

        for instruction in computation.instructions.values():
            found = self._collectives(instruction)
            if found:
                own = self._beside(computation, instruction)
                seconds = sum(one.seconds for one in found)
                busy_until, last = max(now, busy_until) + seconds, found
                communication += seconds
                compute += own
                if instruction.opcode.endswith("-start"):
                    running[instruction.name] = busy_until, found
                else:
                    now += own
                    wait(busy_until, found)
            elif instruction.opcode == "async-update":
                running[instruction.name] = running.get(instruction.operands[0], (0.0, []))
            elif instruction.opcode.endswith("-done"):
                wait(*running.get(instruction.operands[0], (0.0, [])))
            elif instruction.opcode in ("while", "call", "conditional"):
                inner, trips, inside = self._inner(instruction)
                if inner.communication:
                    wait(busy_until, last)
                now += trips * inner.total
                compute += trips * inner.compute
                communication += trips * inner.communication
                unestimated += trips * inner.unestimated
                for name, lost in inside.items():
                    waited[name] += trips * lost
            else:
                seconds, estimated = seconds_of(self.module, computation, instruction, self.chip)
                now += seconds
                compute += seconds
                unestimated += 0.0 if estimated else seconds
        return Times(now, compute, communication, 0.0, unestimated)

    def _inner(self, instruction: hlo.Instruction) -> tuple[Times, int, dict[str, float]]:
        """A loop's body with its trips, a call once, the longest branch; and its waits."""
        names = [name for role, name in instruction.called if role != "condition"]
        if instruction.opcode == "while":
            trips = self.trips[instruction.name]
            return self.computation(names[0]), trips, self.waited[names[0]]
        longest = max(names, key=self.computation)
        return self.computation(longest), 1, self.waited[longest]

    def _collectives(self, instruction: hlo.Instruction) -> list[Collective]:
        """The collective an instruction is or starts, or those that a fusion or call wraps.

        Of several that are wrapped together one follows the other.
        """
        found = self.collectives.get(instruction.name)
        if found:
            return [found]
        if instruction.opcode not in ("fusion", "async-start", "call-start"):
            return []
        return [
            self.collectives[inner.name]
            for _, name in instruction.called
            for inner in self.module.computations[name].instructions.values()
            if kind_of(inner, name)
        ]

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
