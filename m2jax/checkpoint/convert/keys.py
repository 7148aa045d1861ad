# SPDX-License-Identifier: Apache-2.0
"""What the readers of foreign configs share: no key that may change the function goes unread."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from m2jax.config import UserError
from m2jax.config_dual import Dual


def check_keys(
    given: Mapping[str, Any],
    *,
    read: Collection[str],
    fixed: Mapping[str, Any],
    idle: Collection[str],
    where: str,
) -> None:
    """Refuses keys that would, or might, change the function.

    Args:
        given: one group of a config.
        read: keys the caller reads itself.
        fixed: keys that only one value of is supported, with that value.
        idle: keys without effect on inference.
        where: the group, for errors.

    Raises:
        UserError: another value of a fixed key, or a key of no kind.
    """
    for key, value in given.items():
        if key in fixed and value != fixed[key]:
            raise UserError(f"{where}.{key}={value!r}: only {fixed[key]!r} is supported here")
        if key not in read and key not in fixed and key not in idle:
            raise UserError(
                f"{where}.{key}={value!r}: unknown, so it might change the function: remove it "
                "if it does not"
            )


def numbers(value: Any) -> tuple[float, ...]:
    """The numbers of a JSON list; anything else as one value, for ``check`` to refuse by name."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def same_function(a: Dual, b: Dual) -> bool:
    """Whether two configs describe one function; ``eos_id`` counts where it is read."""

    def plain(cfg: Dual) -> Dual:
        eos = cfg.text.eos_id if cfg.text.pooling == "eos" else 0
        execution = ("dtype", "param_dtype", "attention", "remat", "unroll")  # how, not what
        fields = {key: getattr(Dual(), key) for key in execution}
        return replace(cfg, text=replace(cfg.text, eos_id=eos), **fields)

    return plain(a) == plain(b)
