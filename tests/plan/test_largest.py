# SPDX-License-Identifier: Apache-2.0
"""The search for the largest batch: it never claims what it did not see."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2jax import config
from m2jax.dist.topology import CHIPS
from m2jax.plan import compile as compile_lib
from m2jax.plan import largest, planner

LIMIT = 1e4


def search(start: int, total, state: float = 0.0, compiles: int = 40) -> list[largest.Try]:
    """Tries until the search ends, of a program that takes ``total(rows)`` bytes."""
    tries: list[largest.Try] = []
    rows: int | None = start
    while rows is not None and len(tries) < compiles:
        tries.append(largest.Try(rows, total(rows), total(rows) <= LIMIT))
        rows = largest.next_rows(tries, LIMIT, state)
    return tries


@given(
    start=st.integers(1, 3000),
    each=st.floats(3.0, 5000.0),
    state=st.floats(0, 5000),
    jump=st.floats(0, 3000),
    at=st.integers(1, 2000),
)
def test_it_ends_within_a_step_of_the_largest(start, each, state, jump, at) -> None:
    def total(rows):
        return state + each * rows + jump * (rows >= at)

    tries = search(start, total, state)
    true = max((rows for rows in range(1, 4000) if total(rows) <= LIMIT), default=0)
    found = max((one.rows for one in tries if one.fits), default=0)
    assert true - found < largest.UNIT
    if true < largest.UNIT:
        assert found == true
    assert len({one.rows for one in tries}) == len(tries)  # nothing is compiled twice
    assert len(tries) < 16


@pytest.mark.parametrize(
    ("start", "total", "best"),
    [
        (63, lambda rows: 10_000 / 58 * rows, 56),
        (12, lambda rows: 10_000 / 10 * rows, 8),
        (8, lambda rows: 10_000 / 5 * rows, 5),
        (8, lambda rows: 6_000 + 5 * rows, 800),
    ],
)
def test_searches_that_once_went_wrong(start, total, best) -> None:
    tries = search(start, total, compiles=8)
    assert max(one.rows for one in tries if one.fits) == best


def plans(fitting: int):
    """A planner that fits up to so many rows of all 8 devices."""

    def plan(experiment, machine, *, contrastive=False, say=print):
        assert experiment.data.batch_size % (8 * experiment.train.accumulate) == 0
        rows = experiment.data.batch_size
        memory = compile_lib.Memory(1, 2, rows, 3 + rows)
        times = planner.Times(1.0, 1.0, 0.0, 0.5, 0.0) if rows <= fitting else None
        chip = dataclasses.replace(CHIPS["v5e"], memory=1e15)
        topology = planner.Topology("toy", chip, tuple(range(8)), 1)
        return planner.Plan(
            topology=topology, mesh={"replica": 1, "data": 8, "fsdp": 1, "model": 1},
            batch_size=rows, memory=memory, compile_seconds=0.0, times=times,
        )  # fmt: skip

    return plan


@pytest.mark.parametrize(("accumulate", "best"), [(1, 960), (3, 984)])
def test_batches_divide_over_devices_and_micro_batches(monkeypatch, accumulate, best) -> None:
    memory = dataclasses.replace(CHIPS["v5e"], memory=1000.0)
    monkeypatch.setattr(largest, "plan", plans(1000))
    monkeypatch.setattr(largest, "describe", lambda name: planner.Topology(name, memory, (), 1))
    experiment = config.Experiment(
        data=config.Data(batch_size=8 * 8 * accumulate), train=config.Train(accumulate=accumulate)
    )
    tried = largest.largest_batch(experiment, "toy", compiles=20)
    assert best - 8 * 8 * accumulate < max(one.batch_size for one in tried if one.fits) <= 1000


def test_what_is_said_is_what_was_seen() -> None:
    experiment = config.Experiment(data=config.Data(batch_size=64))
    of = {
        rows: plans(100)(dataclasses.replace(experiment, data=config.Data(batch_size=rows)), None)
        for rows in (64, 96, 128)
    }
    told = largest.limits([of[64], of[128], of[96]])
    assert told == "largest batch tried that fits: 96; 128 does not"
    assert largest.limits([of[128]]) == "no batch tried fits; 128 does not"
    assert "larger ones were not tried" in largest.limits([of[64]])
