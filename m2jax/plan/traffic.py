# SPDX-License-Identifier: Apache-2.0
"""Bytes that instructions move between a device's main memory and its arithmetic units."""

from __future__ import annotations

from m2jax.plan.hlo import Computation, Instruction, Module

NOTHING = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "opt-barrier", "while", "call", "conditional", "iota", "domain",
    "copy-done", "slice-done", "async-done", "async-update", "call-done",
    "async-start", "call-start",  # what they wrap is walked by itself
    "all-gather-done", "all-reduce-done", "collective-permute-done",
}  # fmt: skip


def moved(module: Module, computation: Computation, instruction: Instruction) -> float:
    """Bytes one run of an instruction reads and writes, each array once.

    What lies in a nearer memory is not counted; of a stack that a slice is read out of or written
    into, the slice counts alone. Collectives count what they read and write, not what they send.
    """
    if instruction.opcode in NOTHING:
        return 0.0
    if instruction.opcode == "fusion":
        return _fusion(module.computations[instruction.called[0][1]], computation, instruction)
    if instruction.opcode in ("dynamic-slice", "slice", "gather"):
        return 2.0 * instruction.main_bytes
    if instruction.opcode == "dynamic-update-slice":
        update = computation.instructions[instruction.operands[1]]
        return 2.0 * update.main_bytes
    if instruction.opcode in ("copy-start", "slice-start"):  # (to, from, flag)
        return float(sum(a.bytes for a in instruction.arrays[:2] if not a.on_chip))
    if instruction.opcode in ("all-gather-start", "collective-permute-start"):
        return float(instruction.main_bytes)  # of a tuple of what they read and what they write
    reads = {name: computation.instructions.get(name) for name in instruction.operands}
    return float(instruction.main_bytes + sum(one.main_bytes for one in reads.values() if one))


def _fusion(inner: Computation, computation: Computation, instruction: Instruction) -> float:
    users: dict[str, list[Instruction]] = {}
    for one in inner.instructions.values():
        if one.opcode != "bitcast":  # the same bytes by another name
            for name in one.operands:
                users.setdefault(_renamed(inner, name), []).append(one)
    total = 0.0
    for one in inner.instructions.values():
        if one.opcode != "parameter":
            continue
        source = computation.instructions.get(instruction.operands[int(one.arguments)])
        using = users.get(one.name, [])
        if using and all(_slices(inner, user, one) for user in using):
            total += sum(user.bytes for user in using)
        elif source is not None and not _only_updated(inner, one, using):
            total += source.main_bytes
    root = inner.root
    roots = root.operands if root.opcode == "tuple" else (root.name,)
    outputs = [inner.instructions[_renamed(inner, name)] for name in roots]
    for output, array in zip(outputs, instruction.arrays, strict=False):
        if output.opcode == "dynamic-update-slice":
            total += inner.instructions[output.operands[1]].bytes
        elif not array.on_chip:
            total += array.bytes
    return total


def _renamed(inner: Computation, name: str) -> str:
    """The instruction whose bytes a chain of bitcasts only shows in another shape."""
    while (one := inner.instructions[name]).opcode == "bitcast":
        name = one.operands[0]
    return name


def _slices(inner: Computation, user: Instruction, parameter: Instruction) -> bool:
    """Whether an instruction reads a part of this operand (which is not its index)."""
    first = user.operands and _renamed(inner, user.operands[0])
    return user.opcode in ("dynamic-slice", "slice", "gather") and first == parameter.name


def _only_updated(inner: Computation, parameter: Instruction, using: list[Instruction]) -> bool:
    """Whether a fusion only writes a slice into this operand, in place."""
    return bool(using) and all(
        user.opcode == "dynamic-update-slice"
        and _renamed(inner, user.operands[0]) == parameter.name
        for user in using
    )
