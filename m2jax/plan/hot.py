# SPDX-License-Identifier: Apache-2.0
"""Where the compute of a step goes: instructions by the line of the program they come from."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from m2jax.dist.topology import Chip
from m2jax.plan import flops, hlo, schedule, traffic
from m2jax.plan.collectives import Collective, kind_of
from m2jax.plan.loops import Visit

_WRAPPERS = re.compile(r"\b(?:jit|pjit|jvp|transpose|vmap|remat|checkpoint|rematted_computation)\b")


class Hot(NamedTuple):
    """Instructions of one origin, on one device and step."""

    origin: str  # of the traced program: "backward blocks/fc1/dot_general"
    seconds: float  # of compute, modelled
    flops: float  # of matrix products
    bytes: float  # to and from main memory
    runs: int

    def bound(self, chip: Chip) -> float:
        """Share of what the roofline allows: its time at peak FLOP/s or memory rate / seconds."""
        best = max(self.flops / chip.peak_flops, self.bytes / chip.memory_rate)
        return best / self.seconds if self.seconds else 0.0


def hottest(
    module: hlo.Module, visits: Iterable[Visit], chip: Chip, collectives: dict[str, Collective]
) -> list[Hot]:
    """Every origin, the one with most seconds first; their seconds add up to the step's compute.

    (All branches of a conditional count here, where the played schedule takes the longest.)
    """
    found: dict[str, Hot] = {}
    for visit in visits:
        one = visit.instruction
        control = one.opcode in ("while", "call", "conditional") or one.opcode.endswith("-done")
        if visit.inside or control:
            continue
        work = flops.instruction_flops(module, visit.computation, one)
        seconds, _ = schedule.seconds_of(module, visit.computation, one, chip)
        if not seconds or (not work and _communicates(module, one, collectives)):
            continue
        origin = origin_of(module, one)
        had = found.get(origin, Hot(origin, 0.0, 0.0, 0.0, 0))
        found[origin] = Hot(
            origin,
            had.seconds + visit.times * seconds,
            had.flops + visit.times * work,
            had.bytes + visit.times * traffic.moved(module, visit.computation, one),
            had.runs + visit.times,
        )
    return sorted(found.values(), key=lambda hot: -hot.seconds)


def origin_of(module: hlo.Module, instruction: hlo.Instruction) -> str:
    """What the traced program calls an instruction, jax's own wrappers left out.

    A fusion goes by the product inside, where it has one: that is what it is for.
    """
    name = instruction.op_name
    if instruction.opcode == "fusion":
        inner = module.computations[instruction.called[0][1]].instructions.values()
        products = [i.op_name for i in inner if i.opcode in ("dot", "convolution") and i.op_name]
        name = products[0] if products else name
    if not name:
        return instruction.opcode
    way = "backward " if "transpose(" in name else ""
    again = "again " if "rematted_computation" in name else ""
    parts = [part for part in re.split(r"[/()]", _WRAPPERS.sub("", name)) if part]
    kept = [part for part in parts if part not in ("while", "body", "closed_call", "step")]
    return way + again + "/".join(kept[-3:])


def _communicates(
    module: hlo.Module, one: hlo.Instruction, collectives: dict[str, Collective]
) -> bool:
    if one.name in collectives:
        return True
    if one.opcode not in ("fusion", "async-start", "call-start"):
        return False
    inner = (i for _, name in one.called for i in module.computations[name].instructions.values())
    return any(kind_of(i, "") for i in inner)
