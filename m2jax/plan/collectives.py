# SPDX-License-Identifier: Apache-2.0
"""Every collective of a compiled program: kind, mesh axis, bytes sent, loop iterations counted.

Bytes are those one device sends in a step by ring algorithms, which no algorithm undercuts by more
than a round: an all-gather or reduce-scatter of b bytes over g devices sends b (g - 1) / g, an
all-reduce twice that (Thakur et al. 2005, "Optimization of collective communication operations").
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from m2jax.dist.topology import Topology
from m2jax.plan.hlo import HloError, Instruction, Module
from m2jax.plan.loops import Visit

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

Groups = tuple[tuple[int, ...], ...]  # device numbers in the order of mesh.devices.flat


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One instruction, over all its runs in a step."""

    name: str
    kind: str
    axis: str  # mesh axes its groups run along, joined by "+"
    group: int  # devices in a group
    times: int  # runs in a step
    sent: float  # bytes one device sends in one run
    rate: float  # bytes/s one device can send at over the links the groups span
    waited: float = 0.0  # seconds of a step, over all runs, that no compute hides

    @property
    def seconds(self) -> float:
        """Of one run, alone on the links."""
        return self.sent / self.rate


def kind_of(instruction: Instruction, computation: str) -> str | None:
    """The collective an instruction is, or starts; ``None`` for all others.

    libtpu writes a fused reduce-scatter as an all-reduce inside a computation named after it.
    """
    name = instruction.opcode.removesuffix("-start")
    if name not in KINDS:
        return None
    if name == "all-reduce" and computation.startswith("all-reduce-scatter"):
        return "reduce-scatter"
    return name


def collectives(
    visits: Iterable[Visit], topology: Topology, axes: dict[str, int]
) -> dict[str, Collective]:
    """Collectives by instruction name.

    Args:
        visits: ``loops.walk`` of the program.
        topology: the machine; its devices stand in the order of the mesh.
        axes: sizes of the mesh axes in their order.

    Raises:
        HloError: groups of a form this reader does not know.
    """
    found: dict[str, Collective] = {}
    places = _Places(topology, axes)
    for visit in visits:
        kind = kind_of(visit.instruction, visit.computation.name)
        if kind is None:
            continue
        name = visit.instruction.name
        if name in found:  # one computation called from several places
            times = found[name].times + visit.times
            found[name] = dataclasses.replace(found[name], times=times)
            continue
        groups = groups_of(visit.instruction, len(topology.devices))
        size = max(len(group) for group in groups)
        found[name] = Collective(
            name=name,
            kind=kind,
            axis=places.axis(groups),
            group=size,
            times=visit.times,
            sent=_sent(visit.instruction, kind, size),
            rate=places.rate(groups, kind),
        )
    return found


def in_text(module: Module) -> set[str]:
    """Names of all collectives anywhere in a program: what ``collectives`` must have reached."""
    return {
        instruction.name
        for computation in module.computations.values()
        for instruction in computation.instructions.values()
        if kind_of(instruction, computation.name)
    }


def _sent(instruction: Instruction, kind: str, group: int) -> float:
    """Bytes one device sends in one run."""
    arrays, share = instruction.arrays, (group - 1) / group
    # (operands, results[, flags]), as many results as operands; an all-reduce names results alone
    if instruction.opcode.endswith("-start") and kind != "all-reduce":
        arrays = arrays[len(instruction.operands) : 2 * len(instruction.operands)]
    size = sum(array.bytes for array in arrays)
    if kind == "reduce-scatter":  # written as such, its result is one share
        whole = size if instruction.opcode.startswith("all-reduce") else size * group
        return whole * share
    if kind == "all-reduce":
        return 2 * size * share
    return size * (1 if kind.startswith("collective-") else share)


def groups_of(instruction: Instruction, devices: int) -> Groups:
    """The sets of devices that talk to each other.

    Raises:
        HloError: an unknown notation.
    """
    text = instruction.attributes
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", text)
    if pairs:
        found = re.findall(r"(\d+),(\d+)", pairs[1])
        return tuple((int(a), int(b)) for a, b in found if a != b) or ((0,),)
    listed = re.search(r"replica_groups=\{(.*?)\}(?=,|$)(?!,\d|,\{)", text)
    if listed:
        sets = re.findall(r"[\d,]+", listed[1].replace("},{", " "))
        return tuple(tuple(map(int, one.strip(",").split(","))) for one in sets) or (
            tuple(range(devices)),
        )
    tiled = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if tiled:
        return _rows(_iota(tiled[2], tiled[3]).reshape(_ints(tiled[1])))
    meshed = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"
        r" \{([^}]*)\}",
        text,
    )
    if meshed and ":" not in meshed[4]:
        return _mesh_groups(meshed[1], meshed[2], meshed[3], meshed[4])
    raise HloError(f"{instruction.name}: unknown notation of its groups: {text[:200]!r}")


def _mesh_groups(sizes: str, iota: str | None, order: str | None, axes: str) -> Groups:
    """``mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}``: groups along a of a named mesh."""
    named = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", sizes)}
    names = list(named)
    ids = _iota(iota, order) if iota else np.arange(math.prod(named.values()))
    grid = ids.reshape(tuple(named.values()))
    along = [names.index(axis) for axis in re.findall(r"'([^']+)'", axes)]
    grid = np.moveaxis(grid, along, range(-len(along), 0))
    return _rows(grid.reshape(-1, math.prod(named[names[i]] for i in along)))


def _iota(dims: str, order: str | None) -> np.ndarray:
    grid = np.arange(math.prod(_ints(dims))).reshape(_ints(dims))
    return grid.transpose(_ints(order)) if order else grid


def _ints(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _rows(grid: np.ndarray) -> Groups:
    return tuple(tuple(map(int, row)) for row in grid)


class _Places:
    """Where the devices of a mesh stand in it and in the machine."""

    def __init__(self, topology: Topology, axes: dict[str, int]):
        self.topology, self.axes = topology, axes
        self.shape = tuple(axes.values())

    def axis(self, groups: Groups) -> str:
        """The mesh axes that members of a group differ in."""
        coordinates = np.array(np.unravel_index(np.concatenate(groups), self.shape))
        starts = np.cumsum([0] + [len(group) for group in groups[:-1]])
        spread = np.maximum.reduceat(coordinates, starts, axis=1)
        spread = spread - np.minimum.reduceat(coordinates, starts, axis=1)
        widest = [int(along.max()) for along in spread]
        return "+".join(a for a, wide in zip(self.axes, widest, strict=True) if wide) or "none"

    def rate(self, groups: Groups, kind: str) -> float:
        """Bytes/s one device can send at: over every link that it has to others of its group.

        A group that leaves a slice or a host goes at the rate of the network there. Groups are
        alike, so the first speaks for all; of permutations the slowest pair does.
        """
        several = groups if kind == "collective-permute" else groups[:1]
        return min(self._group_rate(group, kind) for group in several)

    def _group_rate(self, group: Sequence[int], kind: str) -> float:
        chip, members = self.topology.chip, [self.topology.devices[i] for i in group]
        if len({outside(device, chip.platform) for device in members}) > 1:
            return chip.network_rate
        if chip.platform != "tpu":
            return chip.link_rate
        if kind == "collective-permute":
            return chip.link_rate
        return chip.link_rate * max(self._links(members), 1)

    def _links(self, members: Sequence[Any]) -> int:
        """Links of a device inside a group: two a dimension whose ring it closes, one on a line.

        A torus dimension is a ring when the slice's is: any multiple of 4 where chips form cubes,
        16 where they lie flat (the whole pod).
        """
        links = 0
        everyone = zip(*(device.coords for device in self.topology.devices), strict=True)
        columns = zip(*(device.coords for device in members), strict=True)
        for whole, column in zip(everyone, columns, strict=True):
            size, spanned = max(whole) + 1, len(set(column))
            wraps = size % (4 if len(self.topology.chip.most) == 3 else 16) == 0
            links += 0 if spanned == 1 else 2 if spanned == size and wraps else 1
        return links


def outside(device: object, platform: str) -> int:
    """The slice of a TPU, the host of a GPU: what only the network joins."""
    name = "slice_index" if platform == "tpu" else "process_index"
    return getattr(device, name, 0) or 0
