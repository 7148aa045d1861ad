# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from m2jax.obs.goodput import KINDS, Goodput, total
from m2jax.obs.metrics import read_rows


class Clock:
    """Time that passes when told."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def process(folder, start, work):
    """One process: (kind, seconds) bookings, and steps at which a row is written."""
    clock = Clock()
    goodput = Goodput(folder, clock)
    goodput.start(start)
    for kind, amount in work:
        if kind == "row":
            goodput.write(amount)
        else:
            clock.now += amount
            goodput.book(kind)
    return goodput


def test_every_second_is_booked_once(tmp_path):
    work = [("init", 3), ("data", 1), ("compile", 5), ("step", 2), ("step", 4), ("save", 1)]
    goodput = process(tmp_path, 0, [*work, ("row", 2)])
    assert goodput.seconds == {"init": 3, "data": 1, "compile": 5, "step": 6, "save": 1}
    assert goodput.share() == pytest.approx(6 / 16)
    row = json.loads((tmp_path / "goodput.jsonl").read_text())
    assert row.pop("process")
    spent = {**dict.fromkeys(KINDS, 0), **goodput.seconds}
    assert row == {"step": 2, "from": 0, "seconds": spent}


FIRST = [("init", 3), ("compile", 5), ("step", 10), ("row", 10), ("step", 7), ("data", 1)]


def test_steps_past_the_one_a_run_goes_on_from_are_lost(tmp_path):
    process(tmp_path, 0, [*FIRST, ("row", 20)])
    second = process(tmp_path, 10, [("init", 2), ("compile", 4), ("step", 20), ("row", 30)])
    # Of 52 seconds 10 + 20 were steps that count: 7 + 1 were lost, whatever the second one reached.
    assert second.share() == pytest.approx(30 / 52)
    third = process(tmp_path, 30, [("init", 1), ("step", 5)])
    assert third.share() == pytest.approx(35 / 58)
    rows = [json.loads(line) for line in (tmp_path / "goodput.jsonl").read_text().splitlines()]
    found = total(rows, 30)
    assert found == {"init": 5, "compile": 9, "step": 30, "lost": 8, "data": 0} | {
        "save": 0,
        "evaluation": 0,
    }


def test_a_run_that_starts_over_has_lost_all_its_steps(tmp_path):
    process(tmp_path, 0, [*FIRST, ("row", 20)])
    assert process(tmp_path, 0, [("init", 1), ("step", 1)]).share() == pytest.approx(1 / 28)


def test_a_torn_line_is_left_out(tmp_path):
    process(tmp_path, 0, [*FIRST, ("row", 20)])
    with (tmp_path / "goodput.jsonl").open("a") as file:
        file.write('{"step": 30, "in')
    after = [("step", 2), ("row", 20)]
    assert process(tmp_path, 10, after).share() == pytest.approx(12 / 28)
    # And hides nothing of what comes behind it.
    assert read_rows(tmp_path / "goodput.jsonl")[-1]["seconds"]["step"] == 2
