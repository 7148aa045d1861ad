# SPDX-License-Identifier: Apache-2.0
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from m2jax.dist.preemption import SIGNALS, Preemption


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_stops_at_the_next_step(number: signal.Signals) -> None:
    with Preemption() as preemption:
        assert not preemption.reached(1)
        os.kill(os.getpid(), number)
        assert preemption.reached(2)
        os.kill(os.getpid(), number)  # again, while it saves: this process lives on
        assert preemption.reached(3)


def test_the_handlers_of_before_come_back() -> None:
    def mine(number, frame):
        pass

    before = signal.signal(signal.SIGTERM, mine)
    try:
        with Preemption():
            assert signal.getsignal(signal.SIGTERM) is not mine
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


_CHILD = """
import sys, time
from m2jax.dist.bootstrap import start
from m2jax.dist.preemption import Preemption
start(quiet=True)
with Preemption() as preemption:
    print("listens", flush=True)
    for step in range(1, 1200):
        time.sleep(0.05)
        if preemption.reached(step):
            print("stops", step, flush=True)
            time.sleep(2)  # a save
            print("saved", flush=True)
            sys.exit(42)
"""


def said(path: Path, word: str, timeout_s: float = 120) -> list[str]:
    """The words of the first line that begins with ``word``, as soon as a child has printed it."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        for line in path.read_text().splitlines():
            if line.startswith(word):
                return line.split()
        time.sleep(0.05)
    raise AssertionError(f"no {word!r} in: {path.read_text()}")


@pytest.mark.multiprocess
@pytest.mark.parametrize("number", SIGNALS)
def test_two_processes_stop_at_the_same_step(tmp_path: Path, number: signal.Signals) -> None:
    """One gets the signal, twice before they have agreed; both get it while they save."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    outputs = [tmp_path / f"{index}.txt" for index in range(2)]
    children = []
    for index, output in enumerate(outputs):
        environ = os.environ | {
            "M2JAX_COORDINATOR": address,
            "M2JAX_NUM_PROCESSES": "2",
            "M2JAX_PROCESS_ID": str(index),
            "XLA_FLAGS": "",
        }
        command = [sys.executable, "-c", _CHILD]
        with output.open("wb") as out:
            children.append(
                subprocess.Popen(command, env=environ, stdout=out, stderr=subprocess.STDOUT)
            )
    try:
        for output in outputs:
            said(output, "listens")
        for _ in range(2):
            children[1].send_signal(number)
            time.sleep(0.1)
        stops = [said(output, "stops") for output in outputs]
        for child in children:
            child.send_signal(number)
        assert [child.wait(timeout=120) for child in children] == [42, 42]
        assert stops[0] == stops[1]
        assert all("saved" in output.read_text() for output in outputs)
    finally:
        for child in children:
            child.kill()
