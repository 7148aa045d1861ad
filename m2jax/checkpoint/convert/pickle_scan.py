# SPDX-License-Identifier: Apache-2.0
"""What a pickle would do, found out before it runs: its opcodes are followed, nothing is made.

Three things that no unpickler can be asked to refuse would take the process down: a memo index of
billions, a tuple so deep or so often repeated that hashing it as a key overflows the stack or never
ends. So keys must be strings or numbers that the pickle holds as such, and sets are refused.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Sequence

_MEMO = ("PUT", "BINPUT", "LONG_BINPUT")
_SETS = ("EMPTY_SET", "ADDITEMS", "FROZENSET")
_SCALARS = frozenset({"int", "int_or_bool", "bool", "str", "bytes_or_str"})  # pickletools' names


class Damaged(Exception):
    """The pickle is of the right kind but what it says makes no sense."""


class _Stack:
    """The unpickler's stack, with only this of each object: whether it is a string or a number."""

    def __init__(self) -> None:
        self.scalar: list[bool] = []
        self.memo: dict[int, bool] = {}
        self._marks: list[int] = []

    def step(self, opcode: pickletools.OpcodeInfo, argument: object) -> None:
        """Follows one opcode."""
        name = opcode.name
        if name in _SETS:
            raise Damaged("it holds a set")
        if name == "MARK":
            self._marks.append(len(self.scalar))
        elif name in _MEMO:
            self.memo[int(str(argument))] = self.scalar[-1]
        elif name == "POP" and self._marks and self._marks[-1] == len(self.scalar):
            self._marks.pop()
        else:
            taken = self._take(opcode)
            _check_keys(name, taken)
            if name == "MEMOIZE":
                self.memo[len(self.memo)] = taken[0]
            self.scalar += self._given(opcode, argument, taken)

    def _take(self, opcode: pickletools.OpcodeInfo) -> list[bool]:
        """Removes what the opcode consumes: what lies above the last mark, or a fixed number."""
        before = opcode.stack_before
        if pickletools.markobject not in before:
            first = len(self.scalar) - len(before)
        else:
            first = self._marks.pop() - before.index(pickletools.markobject)
        if first < 0:
            raise Damaged("it takes more than there is")
        taken = self.scalar[first:]
        del self.scalar[first:]
        return taken

    def _given(
        self, opcode: pickletools.OpcodeInfo, argument: object, taken: Sequence[bool]
    ) -> list[bool]:
        if opcode.name in ("DUP", "MEMOIZE"):
            return [taken[0]] * len(opcode.stack_after)
        if opcode.name in ("GET", "BINGET", "LONG_BINGET"):
            return [self.memo[int(str(argument))]]
        return [made.name in _SCALARS for made in opcode.stack_after]


def scan(pickled: bytes, check_name: Callable[[str, str], None]) -> None:
    """Refuses a pickle that would take the process down.

    Args:
        pickled: the pickle.
        check_name: raises on a module and a name that may not be asked for.

    Raises:
        Damaged: a memo index beyond reason, a key that is no string or number, or a set.
    """
    count, highest, stack = 0, 0, _Stack()
    for opcode, argument, _ in pickletools.genops(pickled):
        count += 1
        if opcode.name in _MEMO:
            highest = max(highest, int(str(argument)))
        if opcode.name in ("GLOBAL", "INST"):
            module, _, name = str(argument).partition(" ")
            check_name(module, name)
        stack.step(opcode, argument)
    if highest > count:
        raise Damaged(f"memo index {highest} in {count} steps")


def _check_keys(name: str, taken: Sequence[bool]) -> None:
    """Refuses a key whose hash could cost anything."""
    keys = {"SETITEM": taken[1:2], "SETITEMS": taken[1::2], "DICT": taken[::2]}.get(name, ())
    if not all(keys):
        raise Damaged("a key is neither a string nor a number")
