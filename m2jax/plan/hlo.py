# SPDX-License-Identifier: Apache-2.0
"""Reads an optimised HLO module's text and walks it as it runs: loops count their iterations.

XLA's own cost analysis counts the body of a loop once, so every number here comes from ``walk``,
which multiplies by trip counts instead. The text is public (``Compiled.as_text``); its grammar is
that of the XLA release that wrote it, so whatever is not understood raises ``HloError``.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8, "u64": 8,
    "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16, "token": 0, "opaque": 0,
    "s4": 0.5, "u4": 0.5, "s2": 0.25, "u2": 0.25,
    "f8e4m3fn": 1, "f8e5m2": 1, "f8e4m3": 1, "f8e4m3b11fnuz": 1, "f8e4m3fnuz": 1, "f8e5m2fnuz": 1,
    "f8e3m4": 1, "f8e8m0fnu": 1, "f4e2m1fn": 0.5,
}  # fmt: skip

_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([0-9,]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_END = re.compile(r'^\}(, execution_thread="\w+")?$')
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(calls|body|condition|to_apply|branch_computations|true_computation"
                     r"|false_computation|called_computations)=(\{[^}]*\}|%?[\w.\-]+)")  # fmt: skip
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


class HloError(Exception):
    """The module's text holds something this reader does not understand: no number is given."""


class Array(NamedTuple):
    """One array of a type: ``bf16[64,197,768]``."""

    dtype: str
    shape: tuple[int, ...]
    on_chip: bool = False  # in a memory space nearer than the device's main memory

    @property
    def size(self) -> int:
        """Elements."""
        return functools.reduce(lambda a, b: a * b, self.shape, 1)

    @property
    def bytes(self) -> int:
        """Bytes without the padding of a tiled layout."""
        return int(self.size * BYTES[self.dtype])


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]  # of the result; several for a tuple
    operands: tuple[str, ...]
    arguments: str  # the text between the operator's parentheses
    attributes: str  # after them, without metadata and backend_config
    called: tuple[tuple[str, str], ...]  # (role, computation)
    cycles: int | None  # the compiler's estimate, where it gives one
    trips: int | None  # known_trip_count
    config: str  # backend_config of custom calls, "" of all others
    op_name: str  # where in the traced program it comes from
    is_root: bool

    @property
    def bytes(self) -> int:
        """Bytes of the result."""
        return sum(array.bytes for array in self.arrays)

    @property
    def main_bytes(self) -> int:
        """Bytes of the result that lie in the device's main memory."""
        return sum(array.bytes for array in self.arrays if not array.on_chip)


@dataclass(frozen=True)
class Computation:
    """Instructions in the order they are scheduled in."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @property
    def root(self) -> Instruction:
        """The instruction whose value is the computation's."""
        return next(i for i in self.instructions.values() if i.is_root)


@dataclass(frozen=True)
class Module:
    """All computations of a program for one device."""

    computations: dict[str, Computation]
    entry: str


class Visit(NamedTuple):
    """An instruction as it runs."""

    instruction: Instruction
    computation: Computation
    times: int  # runs per call of the program
    inside: str  # name of the fusion it is part of, "" outside of one


def parse(text: str) -> Module:
    """Reads a module.

    Raises:
        HloError: a line that is no instruction, or no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        # Kernels carry payloads full of braces: only a brace alone in column 0 ends a computation.
        if _END.match(line):
            current = None
        elif current is None:
            header = _HEADER.match(line)
            if header:
                current = Computation(header[2])
                computations[current.name] = current
                entry = header[2] if header[1] else entry
        elif line.strip():
            instruction = _instruction(line)
            current.instructions[instruction.name] = instruction
    if not entry:
        raise HloError("the program's text has no ENTRY computation")
    return Module(computations, entry)


def _instruction(line: str) -> Instruction:
    named = _NAME.match(line)
    if not named:
        raise HloError(f"not an instruction: {line[:120]!r}")
    rest = line[named.end() :]
    end = _matching(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _matching(rest, opening)
    attributes, _, config = rest[closing + 1 :].partition(", backend_config=")
    attributes, _, metadata = attributes.partition(", metadata=")
    op_name = re.search(r'op_name="([^"]*)"', metadata)
    cycles, trips = _CYCLES.search(config), _KNOWN_TRIPS.search(config)
    arguments = rest[opening + 1 : closing]
    return Instruction(
        name=named[2],
        opcode=rest[:opening],
        arrays=arrays(kind),
        operands=tuple(_OPERAND.findall(arguments)),
        arguments=arguments,
        attributes=attributes,
        called=tuple(_called(attributes)),
        cycles=int(cycles[1]) if cycles else None,
        trips=int(trips[1]) if trips else None,
        config=config if rest.startswith("custom-call(") else "",
        op_name=op_name[1] if op_name else "",
        is_root=bool(named[1]),
    )


def _called(attributes: str) -> Iterator[tuple[str, str]]:
    for role, names in _CALLED.findall(attributes):
        for name in names.strip("{}").split(","):
            yield role, name.strip().lstrip("%")


def arrays(kind: str) -> tuple[Array, ...]:
    """The arrays of a type, a tuple's one after the other.

    Raises:
        HloError: an unknown element type.
    """
    found = []
    for dtype, shape, layout in _ARRAY.findall(re.sub(r"/\*.*?\*/", "", kind)):
        if dtype not in BYTES:
            raise HloError(f"unknown element type {dtype!r} in {kind[:120]!r}")
        found.append(Array(dtype, tuple(int(n) for n in shape.split(",") if n), "S(" in layout))
    return tuple(found)


def _matching(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at ``start``."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if not depth:
            return index
    raise HloError(f"unbalanced parentheses: {text[start : start + 120]!r}")


def walk(module: Module, loops: dict[str, int] | None = None) -> Iterator[Visit]:
    """Every instruction that runs, with how often; the inside of fusions included.

    The branches of a conditional all count: an upper bound. ``loops`` collects trip counts by name.

    Raises:
        HloError: a loop whose number of iterations cannot be told.
    """
    entry = module.computations[module.entry]
    yield from _walk(module, entry, 1, "", {}, {} if loops is None else loops)


def _walk(
    module: Module,
    computation: Computation,
    times: int,
    inside: str,
    outer: dict[int, Instruction],
    loops: dict[str, int],
) -> Iterator[Visit]:
    for instruction in computation.instructions.values():
        yield Visit(instruction, computation, times, inside)
        if instruction.opcode == "while":
            trips = loops[instruction.name] = trip_count(module, computation, instruction, outer)
            initial = loop_values(computation, instruction, outer)
            for role, name in instruction.called:
                count = trips if role == "body" else trips + 1
                yield from _walk(
                    module, module.computations[name], times * count, inside, initial, loops
                )
            continue
        within = instruction.name if instruction.opcode == "fusion" else inside
        for role, name in instruction.called:
            if role == "to_apply" and instruction.opcode not in ("call", "call-start"):
                continue  # the scalar function of a reduction
            yield from _walk(module, module.computations[name], times, within, {}, loops)


def trip_counts(module: Module) -> dict[str, int]:
    """Iterations of every loop that runs, by its name."""
    found: dict[str, int] = {}
    for visit in walk(module, found):
        del visit
    return found


def loop_values(
    computation: Computation, loop: Instruction, outer: dict[int, Instruction]
) -> dict[int, Instruction]:
    """What enters a loop at each index of its tuple, where it can be traced to an instruction."""
    start = computation.instructions[loop.operands[0]]
    if start.opcode != "tuple":
        return {}
    values = {}
    for index, name in enumerate(start.operands):
        source = _source(computation, name, outer)
        if source is not None:
            values[index] = source
    return values


def _source(
    computation: Computation, name: str, outer: dict[int, Instruction]
) -> Instruction | None:
    """The instruction behind copies, bitcasts and what a loop carries unchanged."""
    instruction = computation.instructions.get(name)
    while instruction is not None:
        if instruction.opcode in ("copy", "bitcast", "copy-done", "copy-start", "reshape"):
            instruction = computation.instructions.get(instruction.operands[0])
        elif instruction.opcode == "get-tuple-element":
            of = computation.instructions[instruction.operands[0]]
            index = int(re.search(r"index=(\d+)", instruction.attributes)[1])  # type: ignore[index]
            if of.opcode == "parameter":
                return outer.get(index)
            if of.opcode not in ("tuple",):
                return instruction
            instruction = computation.instructions.get(of.operands[index])
        else:
            return instruction
    return None


def trip_count(
    module: Module, computation: Computation, loop: Instruction, outer: dict[int, Instruction]
) -> int:
    """Iterations of a loop ``i = start; while i < bound; i += 1``.

    The compiler's ``known_trip_count`` where it is given; else the bound in the condition, which
    may be a constant there or one that the loop carries.

    Raises:
        HloError: neither can be found.
    """
    if loop.trips is not None:
        return loop.trips
    condition = module.computations[dict(loop.called)["condition"]]
    initial = loop_values(computation, loop, outer)
    compare = _comparison(module, condition)
    if compare is not None:
        sides = [_value(condition, name, initial) for name in compare[1]]
        first, bound = sides
        direction = compare[0]
        if first is not None and bound is not None:
            if direction == "LT":
                return max(bound - first, 0)
            if direction == "GT":  # bound > i, written the other way round
                return max(first - bound, 0)
    raise HloError(
        f"loop {loop.name}: its number of iterations is neither known nor a compared constant"
    )


def _comparison(module: Module, condition: Computation) -> tuple[str, tuple[str, ...]] | None:
    """Direction and operands of a condition, also where it is one fusion."""
    root = condition.root
    if root.opcode == "compare":
        return re.search(r"direction=(\w+)", root.attributes)[1], root.operands  # type: ignore[index]
    if root.opcode == "fusion":
        inner = module.computations[root.called[0][1]]
        if inner.root.opcode == "compare":
            direction = re.search(r"direction=(\w+)", inner.root.attributes)[1]  # type: ignore[index]
            names = []
            for name in inner.root.operands:
                operand = inner.instructions[name]
                if operand.opcode == "parameter":
                    names.append(root.operands[int(operand.arguments)])
                elif operand.opcode == "constant":
                    condition.instructions[operand.name] = operand
                    names.append(operand.name)
                else:
                    return None
            return direction, tuple(names)
    return None


def _value(condition: Computation, name: str, initial: dict[int, Instruction]) -> int | None:
    source = _source(condition, name, initial)
    if source is None or source.opcode != "constant":
        return None
    return int(source.arguments)
