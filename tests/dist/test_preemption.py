# SPDX-License-Identifier: Apache-2.0
import os
import signal

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
