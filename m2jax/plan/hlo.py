# SPDX-License-Identifier: Apache-2.0
"""Reads the text of an optimised HLO module.

The text is public (``Compiled.as_text``); its grammar is that of the XLA release that wrote it, so
whatever is not understood raises ``HloError``.
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
