# SPDX-License-Identifier: Apache-2.0
"""Starts the processes of one run on this machine, waits for them, and reads what they left."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFIG = Path(__file__).parent / "toy_config.py"
# Programs this small are compiled longer than run: 4 s instead of 14. The flag that orders
# collectives, which the tests set for themselves, is left out: what m2jax adds must be enough.
QUICK_COMPILES = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false"
)
LAUNCHERS = ("M2JAX_", "SLURM_", "OMPI_", "SKYPILOT_")  # a launcher around the tests is not theirs


@dataclasses.dataclass
class Job:
    """The processes of one run and where each wrote its output."""

    processes: list[subprocess.Popen[bytes]]
    logs: list[Path]

    def wait(self, *, timeout_s: float = 600, grace_s: float = 30) -> list[int]:
        """Exit codes of all, as a scheduler would get them.

        When one ends with a failure, the rest have ``grace_s`` to end by themselves before they are
        killed, as ``srun --kill-on-bad-exit`` and JobSet do.
        """
        deadline = time.monotonic() + timeout_s
        while any(p.poll() is None for p in self.processes):
            if time.monotonic() > deadline:
                self.signal(signal.SIGKILL)
                break
            if any(p.poll() not in (None, 0) for p in self.processes):
                deadline = min(deadline, time.monotonic() + grace_s)
                grace_s = float("inf")  # counted from the first failure
            time.sleep(0.05)
        return [p.wait() for p in self.processes]

    def signal(self, number: signal.Signals, process: int = -1) -> None:
        """Sends a signal to one of them, or to all."""
        chosen = self.processes if process < 0 else [self.processes[process]]
        for p in chosen:
            if p.poll() is None:
                p.send_signal(number)

    def output(self, process: int = 0) -> str:
        """What a process printed, both streams."""
        return self.logs[process].read_text(errors="replace")


def launch(
    workdir: Path,
    processes: int,
    devices: int,
    *overrides: str,
    faults: tuple[dict, ...] = (),
    store: str = "",
) -> Job:
    """Starts ``m2jax train`` in ``processes`` processes of ``devices`` virtual CPU devices each.

    With ``store`` into that address: every process of every attempt stages in a new folder of its
    own below ``workdir``, as on machines that come with empty disks.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    kept = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHERS)}
    # Only the first process writes this cache, and only the first finds anything in it: the others
    # would compile while it waits, and gloo waits 30 s.
    if processes > 1:
        kept.pop("JAX_COMPILATION_CACHE_DIR", None)
    kept["XLA_FLAGS"] = QUICK_COMPILES
    workdir.mkdir(parents=True, exist_ok=True)
    attempts = workdir / "attempts"
    attempt = len(attempts.read_bytes()) if attempts.exists() else 0
    attempts.write_bytes(b"." * (attempt + 1))
    words = ["train", "--config", str(CONFIG), "--workdir", store or str(workdir)]
    words += [f"--config.mesh.cpu_devices={devices}", *(f"--config.{o}" for o in overrides)]
    job = Job([], [])
    for index in range(processes):
        environ = kept | {
            "M2JAX_NUM_PROCESSES": str(processes),
            "M2JAX_FAULT": json.dumps(faults),
            "M2JAX_ATTEMPT": str(attempt),
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(ROOT),
        }
        if store:
            staging = workdir / f"staging-{attempt}-{index}"
            environ |= {"M2JAX_NOTES": str(workdir), "M2JAX_STAGING": str(staging)}
        if processes > 1:
            environ |= {"M2JAX_COORDINATOR": address, "M2JAX_PROCESS_ID": str(index)}
        log = workdir / f"output-{index}.txt"
        with log.open("wb") as out:
            job.processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.multiprocess.worker", *words],
                    cwd=ROOT,
                    env=environ,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                )
            )
        job.logs.append(log)
    return job


def killed(codes: list[int]) -> bool:
    """Whether a SIGKILL to all ended all; the later ones may have aborted for want of the first."""
    return -9 in codes and {*codes} <= {-9, -6, 1}


def losses(workdir: Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm of every step, from the rows of the run."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in rows}


def samples(workdir: Path) -> dict[int, list[int]]:
    """Sample ids of every step that counts, over all processes, sorted.

    A step that was run again after a fault counts as the last attempt ran it.
    """
    runs: dict[tuple[int, int], list[int]] = {}
    for file in workdir.glob("ids-*.jsonl"):
        for line in file.read_text().splitlines():
            row = json.loads(line)
            runs.setdefault((row["step"], row["attempt"]), []).extend(row["ids"])
    return {step: sorted(runs[step, attempt]) for step, attempt in sorted(runs)}


def consecutive(taken: dict[int, list[int]], batch_size: int = 16) -> bool:
    """Whether step after step took the next rows, each once."""
    return all(
        ids == list(range((step - 1) * batch_size, step * batch_size))
        for step, ids in taken.items()
    )
