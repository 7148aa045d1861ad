# SPDX-License-Identifier: Apache-2.0
"""``m2jax launch slurm --submit`` on a real Slurm: preempted, killed, cancelled, refused."""

import contextlib
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("jinja2", reason="needs the package jinja2")

from m2jax.cli.main import main
from tests.launch import slurm
from tests.multiprocess import harness

CONFIG = Path(__file__).with_name("toy_job.py")
ROOT = Path(__file__).parents[2]
STEPS = 20

reason = slurm.missing()
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.multiprocess,
    pytest.mark.skipif(bool(reason), reason=reason),
]


@pytest.fixture(scope="module")
def cluster():
    with slurm.cluster(2) as made:
        yield made


class Run:
    """A submitted run: its number, its log, its rows."""

    def __init__(self, job: int, folder: Path) -> None:
        self.job, self.folder = job, folder

    @property
    def log(self) -> str:
        file = self.folder / f"toy-job-{self.job}.log"
        return file.read_text() if file.exists() else ""

    @property
    def rows(self) -> list[dict]:
        file = self.folder / "run" / "metrics.jsonl"
        if not file.exists():
            return []
        lines = file.read_text().split("\n")[:-1]  # the last one may be half written
        return [json.loads(line) for line in lines]

    @property
    def trace(self) -> list[tuple]:
        return [(row["step"], row["loss"], row["grad_norm"]) for row in self.rows]

    def wait_for(self, step: int) -> None:
        try:
            slurm.until(lambda: self.rows and self.rows[-1]["step"] >= step, 240)
        except TimeoutError:
            pytest.fail(f"no step {step} after 240 s:\n{self.log}")


@pytest.fixture
def submit(cluster, tmp_path, monkeypatch, capfd):
    """Submits the toy from an empty folder, as a person would from a shell."""

    def put(*words: str) -> Run:
        monkeypatch.chdir(tmp_path)
        for name, value in cluster.environ.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{os.environ.get('PYTHONPATH', '')}")
        # As in tests/multiprocess/harness.py: quick compiles, and no cache that the first process
        # alone would find filled, since gloo waits 30 s for the others.
        for name in ("JAX_COMPILATION_CACHE_DIR", "PJRT_NPROC"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("XLA_FLAGS", harness.QUICK_COMPILES)
        common = ["--config", str(CONFIG), "--workdir", "run", "--nodes", "2"]
        program = f"{sys.executable} -m m2jax"
        line = ["launch", "slurm", *common, "--program", program, "--submit", *words]
        assert main(line) == 0
        told = re.search(r"Submitted batch job (\d+)", capfd.readouterr().out)
        assert told
        return Run(int(told[1]), tmp_path)

    return put


def test_preempted_and_killed_it_finishes_with_the_trace_of_an_undisturbed_run(
    cluster, submit, tmp_path
) -> None:
    undisturbed = submit("--tasks-per-node", "2")
    assert cluster.wait(undisturbed.job, "COMPLETED", "FAILED")["JobState"] == "COMPLETED", (
        undisturbed.log
    )
    assert re.search(r"process 1 of 4, 1 local of 4 devices \(cpu\), via slurm", undisturbed.log)
    assert re.search(r"process 4 of 4", undisturbed.log)
    expected = undisturbed.trace
    assert [row[0] for row in expected] == list(range(1, STEPS + 1))
    (tmp_path / "run").rename(tmp_path / "undisturbed")

    run = submit("--tasks-per-node", "2", "--env", "TOY_SECONDS=0.5")
    run.wait_for(4)
    cluster.run("scancel", "--signal=TERM", f"{run.job}.0")
    cluster.wait(run.job, "PENDING")
    assert "preempted after a save" in run.log
    stopped = run.rows[-1]["step"]
    assert 4 <= stopped < STEPS
    assert not list(tmp_path.glob("failures-*"))  # it does not count as a failure

    cluster.go(run.job)
    run.wait_for(stopped + 2)
    begun = time.monotonic()
    for pid in cluster.pids(run.job, 3):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    cluster.wait(run.job, "PENDING", seconds=90)
    assert time.monotonic() - begun < 90
    assert "failure 1, 3 may be restarted" in run.log

    cluster.go(run.job)
    ended = cluster.wait(run.job, "COMPLETED", "FAILED")
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "2"), run.log
    assert run.trace == expected


def test_a_cancelled_job_saves_and_stays_away(cluster, submit, tmp_path) -> None:
    run = submit("--tasks-per-node", "1", "--env", "TOY_SECONDS=0.5")
    run.wait_for(2)
    cluster.run("scancel", str(run.job))
    ended = cluster.wait(run.job, "CANCELLED", "COMPLETED", "FAILED")
    assert ended["JobState"] == "CANCELLED"
    slurm.until(lambda: not cluster.run("squeue", "-h", "-j", str(run.job)), 60)
    time.sleep(1)
    after = cluster.show(run.job)
    assert (after["JobState"], after["Restarts"]) == ("CANCELLED", "0"), run.log
    saved = [int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit()]
    assert max(saved) == run.rows[-1]["step"]  # beside a regular save, when the end came late


def test_bad_input_is_not_tried_again(cluster, submit, tmp_path) -> None:
    (tmp_path / "run").write_text("a file where the folder should be")
    run = submit("--tasks-per-node", "1")
    ended = cluster.wait(run.job, "FAILED", "COMPLETED")
    assert (ended["ExitCode"], ended["Restarts"]) == ("2:0", "0"), run.log
    assert "m2jax: error: --workdir run" in run.log
