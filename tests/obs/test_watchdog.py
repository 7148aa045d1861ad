# SPDX-License-Identifier: Apache-2.0
"""A stalled process ends itself with code 43 and every thread's stack; a live one is left alone."""

import subprocess
import sys
import time

import pytest

_CHILD = """
import sys, threading, time
from m2jax.obs.watchdog import Watchdog

def waits_for_ever():
    threading.Event().wait()

threading.Thread(target=waits_for_ever, daemon=True).start()
with Watchdog(float(sys.argv[1])) as watchdog:
    for step in range(int(sys.argv[2])):
        watchdog.beat(step)
        time.sleep(0.1)
    time.sleep(float(sys.argv[3]))
print("left")
"""


def child(stall_s: float, beats: int, then_s: float) -> tuple[int, str, str, float]:
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(stall_s), str(beats), str(then_s)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr, time.monotonic() - begin


def test_a_stall_ends_with_every_stack() -> None:
    code, _, err, seconds = child(0.5, 5, 30)
    assert code == 43
    assert "after step 4: nothing happened for 0.5" in err
    assert "waits_for_ever" in err  # another thread's stack
    assert "<module>" in err  # the main thread's
    assert 0.9 < seconds < 10


@pytest.mark.parametrize(("stall_s", "beats", "then_s"), [(0.5, 10, 0.1), (0, 1, 0.5)])
def test_a_run_that_goes_on_is_left_alone(stall_s: float, beats: int, then_s: float) -> None:
    code, out, err, _ = child(stall_s, beats, then_s)
    assert (code, out, err) == (0, "left\n", "")


def test_the_first_step_may_take_longer() -> None:
    assert child(0.5, 0, 1.0)[0] == 0
    code, _, err, _ = child(0.5, 0, 30)
    assert code == 43
    assert "before the first step: nothing happened for 2" in err
