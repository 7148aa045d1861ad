# SPDX-License-Identifier: Apache-2.0
"""Walks a program as it runs: loops count their iterations.

XLA's own cost analysis counts the body of a loop once; every sum of a plan comes from ``walk``,
which multiplies by trip counts instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from m2jax.plan.hlo import Computation, HloError, Instruction, Module

Values = dict[int, Instruction]  # what stands at each index of a loop's tuple when it starts


class Visit(NamedTuple):
    """An instruction as it runs."""

    instruction: Instruction
    computation: Computation
    times: int  # runs per call of the program
    inside: str  # name of the fusion it is part of, "" outside of one


def walk(module: Module, loops: dict[str, int] | None = None) -> Iterator[Visit]:
    """Every instruction that runs, with how often; the inside of fusions included.

    The branches of a conditional all count: an upper bound. ``loops`` collects trip counts by name.

    Raises:
        HloError: a loop whose number of iterations cannot be told.
    """
    entry = Visit(module.computations[module.entry].root, module.computations[module.entry], 1, "")
    yield from _walk(module, entry, {}, {} if loops is None else loops)


def _walk(module: Module, at: Visit, outer: Values, loops: dict[str, int]) -> Iterator[Visit]:
    """Walks the computation of ``at``, which runs ``at.times`` times."""
    for instruction in at.computation.instructions.values():
        yield at._replace(instruction=instruction)
        inside, initial, times = at.inside, outer, dict[str, int]()
        if instruction.opcode == "while":
            initial = _entering(at.computation, instruction, outer)
            trips = loops[instruction.name] = trip_count(module, instruction, initial)
            times = {"body": trips, "condition": trips + 1}
        elif instruction.opcode == "fusion":
            inside = instruction.name
        for role, name in instruction.called:
            if role == "to_apply" and instruction.opcode not in ("call", "call-start"):
                continue  # the scalar function of a reduction
            called = Visit(
                instruction, module.computations[name], at.times * times.get(role, 1), inside
            )
            yield from _walk(module, called, initial if times else {}, loops)


def trip_counts(module: Module) -> dict[str, int]:
    """Iterations of every loop that runs, by its name."""
    found: dict[str, int] = {}
    for _ in walk(module, found):
        pass
    return found


def trip_count(module: Module, loop: Instruction, initial: Values) -> int:
    """Iterations of a loop ``i = start; while i < bound; i += step``.

    The compiler's ``known_trip_count`` where it is given; else the bound in the condition, which is
    a constant there or one that the loop carries unchanged.

    Raises:
        HloError: the bound cannot be found, or the counter does not go up by a constant.
    """
    if loop.trips is not None:
        return loop.trips
    called = dict(loop.called)
    compared = _comparison(module, module.computations[called["condition"]], initial)
    if compared is not None:
        first, bound = compared
        body = module.computations[called["body"]]
        step = _step(body, first)
        if step is not None and step > 0 and _unchanged(body, bound):
            distance = _number(bound, initial) - _number(first, initial)
            return max(-(-distance // step), 0)
    raise HloError(
        f"loop {loop.name}: its number of iterations is neither known nor a compared constant"
    )


Side = int | Instruction  # of a comparison: an index of the loop's tuple, or a constant


def _comparison(
    module: Module, condition: Computation, initial: Values
) -> tuple[Side, Side] | None:
    """(counter, bound) of ``counter < bound``, also where the condition is one fusion."""
    root, outside = condition.root, {}
    inner = condition
    if root.opcode == "fusion":
        inner = module.computations[root.called[0][1]]
        outside = dict(enumerate(root.operands))
        root = inner.root
    direction = re.search(r"direction=(LT|GT)", root.attributes)
    if root.opcode != "compare" or not direction:
        return None
    sides: list[Side] = []
    for name in root.operands:
        operand = inner.instructions[name]
        if operand.opcode == "parameter" and outside:
            name, where = outside[int(operand.arguments)], condition
        else:
            where = inner
        side = _side(where, name)
        if side is None or (isinstance(side, int) and side not in initial):
            return None
        sides.append(side)
    return (sides[0], sides[1]) if direction[1] == "LT" else (sides[1], sides[0])


def _side(computation: Computation, name: str) -> Side | None:
    """A constant, or the index of the loop's tuple that a value is read from."""
    source = _source(computation, name, {})
    if source is None:
        return None
    if source.opcode == "constant":
        return source
    if source.opcode == "get-tuple-element":
        of = computation.instructions[source.operands[0]]
        return _index(source) if of.opcode == "parameter" else None
    return None


def _number(side: Side, initial: Values) -> int:
    source = initial[side] if isinstance(side, int) else side
    if source.opcode != "constant":
        raise HloError(f"{source.name}: a loop's bound that is no constant")
    return int(source.arguments)


def _step(body: Computation, counter: Side) -> int | None:
    """What an iteration adds to the counter."""
    if not isinstance(counter, int) or body.root.opcode != "tuple":
        return None
    update = _source(body, body.root.operands[counter], {})
    if update is None or update.opcode != "add":
        return None
    sides = [_side(body, name) for name in update.operands]
    constants = [int(s.arguments) for s in sides if isinstance(s, Instruction)]
    return constants[0] if counter in sides and len(constants) == 1 else None


def _unchanged(body: Computation, bound: Side) -> bool:
    if not isinstance(bound, int):
        return True
    return body.root.opcode == "tuple" and _side(body, body.root.operands[bound]) == bound


def _entering(computation: Computation, loop: Instruction, outer: Values) -> Values:
    """What enters a loop at each index of its tuple, where it can be traced to an instruction."""
    start = computation.instructions[loop.operands[0]]
    if start.opcode != "tuple":
        return {}
    sources = {i: _source(computation, name, outer) for i, name in enumerate(start.operands)}
    return {index: source for index, source in sources.items() if source is not None}


def _source(computation: Computation, name: str, outer: Values) -> Instruction | None:
    """The instruction behind copies and tuples; ``outer`` is what the enclosing loop carries."""
    instruction = computation.instructions.get(name)
    while instruction is not None:
        if instruction.opcode in ("copy", "bitcast", "copy-done", "copy-start", "reshape"):
            instruction = computation.instructions.get(instruction.operands[0])
            continue
        if instruction.opcode != "get-tuple-element":
            return instruction
        of = computation.instructions[instruction.operands[0]]
        if of.opcode == "tuple":
            instruction = computation.instructions.get(of.operands[_index(instruction)])
            continue
        return (
            outer.get(_index(instruction), instruction) if of.opcode == "parameter" else instruction
        )
    return None


def _index(instruction: Instruction) -> int:
    found = re.search(r"index=(\d+)", instruction.attributes)
    if not found:
        raise HloError(f"{instruction.name}: get-tuple-element without an index")
    return int(found[1])
