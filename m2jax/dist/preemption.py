# SPDX-License-Identifier: Apache-2.0
"""Notice that this run will be ended soon, and the step at which all its processes act on it.

Schedulers send SIGTERM (Slurm's ``--signal=TERM@120``, Kubernetes, spot machines) or SIGUSR1 (Slurm
users' habit for the time limit) to some processes or to all. With several processes jax's preemption
service tells every one, and they agree on a step that none has passed yet; one process alone simply
stops at the next step.
"""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preemption:
    """Listens while a run goes on: ``with Preemption() as preemption: ... preemption.reached(step)``.

    Inside the block a signal never ends the process, however often it comes: what is being saved is
    saved. After it they do what they did before. Enter it on the main thread.
    """

    def __init__(self) -> None:
        self._noticed = False
        self._service = jax.process_count() > 1  # which then listens to SIGTERM, in C++

    def __enter__(self) -> Preemption:
        # None stands for the service's own, which ends with the run.
        self._before = {n: signal.getsignal(n) or signal.SIG_DFL for n in SIGNALS}
        signal.signal(signal.SIGUSR1, self._forward if self._service else self._notice)
        if not self._service:
            signal.signal(signal.SIGTERM, self._notice)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def reached(self, step: int) -> bool:
        """Whether the run saves and stops after ``step``: the same answer in every process.

        Call it once for every step, in every process.
        """
        if self._service:
            self._noticed = multihost_utils.reached_preemption_sync_point(step)
        if self._noticed:
            # The service listens once; a second SIGTERM would end the process while it saves.
            for number in SIGNALS:
                signal.signal(number, self._notice)
        return self._noticed

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self._noticed = True

    def _forward(self, number: int, frame: FrameType | None) -> None:
        signal.raise_signal(signal.SIGTERM)
