# SPDX-License-Identifier: Apache-2.0
"""The largest batch that fits a machine, by a few compiles."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from m2jax.config import Experiment
from m2jax.dist.sharding import batch_shards
from m2jax.dist.topology import describe
from m2jax.plan.compile import silent
from m2jax.plan.planner import Plan, plan

UNIT = 8  # rows of a device that a search moves in, while it has as many


class Try(NamedTuple):
    """One batch that was planned."""

    rows: int  # of a device, and of a micro-batch where the run accumulates
    total: float  # bytes
    fits: bool


def largest_batch(
    experiment: Experiment,
    topology: str,
    *,
    compiles: int = 8,
    say: Callable[[str], None] = silent,
) -> list[Plan]:
    """Plans ever closer to the largest batch that fits; rows per device in steps of 8 (or 1).

    Returns:
        Every plan that was made, in order; ``limits`` says what they show.

    Raises:
        UserError: as ``plan``.
    """
    machine = describe(topology)
    plans = [plan(experiment, machine, say=say)]
    first = plans[0]
    rows = batch_shards(first.mesh) * experiment.train.accumulate
    state = first.memory.parameters + first.memory.optimizer
    tries = [Try(first.batch_size // rows, first.memory.total, first.fits)]
    while len(plans) < compiles:
        guess = next_rows(tries, machine.chip.memory, state)
        if guess is None:
            break
        data = dataclasses.replace(experiment.data, batch_size=guess * rows)
        plans.append(plan(dataclasses.replace(experiment, data=data), machine, say=say))
        tries.append(Try(guess, plans[-1].memory.total, plans[-1].fits))
    return plans


def next_rows(tries: list[Try], limit: float, state: float) -> int | None:
    """The next batch to try; ``None`` where the largest that fits meets the least that does not.

    Memory grows about linearly with the batch: the first guess lies on a line through the state's
    bytes, the second on one through both tries; later ones halve what is left.

    Args:
        tries: so far, at least one.
        limit: bytes of the device.
        state: bytes of parameters and optimiser, which do not grow.
    """
    low = max((one.rows for one in tries if one.fits), default=0)
    high = min((one.rows for one in tries if not one.fits), default=0)  # 0: none yet
    unit = UNIT if low >= UNIT or high > UNIT or (not high and tries[0].rows >= UNIT) else 1
    if high and high - low <= unit:
        return None
    last, before = tries[-1], Try(0, state, True)
    if len(tries) > 1 and tries[-2].rows != last.rows:
        before = tries[-2]
    slope = max((last.total - before.total) / (last.rows - before.rows), 1.0)
    guess = int(last.rows + (limit - last.total) / slope)
    if high and (len(tries) > 2 or not low < guess < high):
        guess = (low + high) // 2
    guess = max(guess // unit * unit, low // unit * unit + unit)
    return guess if not high or guess < high else None


def limits(plans: list[Plan]) -> str:
    """What a search showed, in one line."""
    fit = max((one.batch_size for one in plans if one.fits), default=0)
    too_large = min((one.batch_size for one in plans if not one.fits), default=0)
    found = f"largest batch tried that fits: {fit:,}" if fit else "no batch tried fits"
    if not too_large:
        return f"{found}; larger ones were not tried: start from a larger data.batch_size"
    return f"{found}; {too_large:,} does not"
