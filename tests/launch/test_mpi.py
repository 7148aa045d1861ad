# SPDX-License-Identifier: Apache-2.0
"""``m2jax launch mpi`` through a real mpirun: two processes, told to end, started again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("jinja2", reason="needs the package jinja2")

from m2jax.cli.main import main
from tests.multiprocess import harness

CONFIG = Path(__file__).with_name("toy_job.py")
ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.soak,
    pytest.mark.slow,
    pytest.mark.multiprocess,
    pytest.mark.skipif(
        shutil.which("mpirun") is None,
        reason="no mpirun here: apt-get install --no-install-recommends openmpi-bin",
    ),
]


@pytest.fixture
def start(tmp_path, capsys):
    """Starts the rendered script; what still runs at the end of the test is ended."""
    jobs: list[subprocess.Popen] = []

    def put(workdir: str, seconds: str) -> subprocess.Popen:
        jobs.append(begin(tmp_path, workdir, seconds, capsys))
        return jobs[-1]

    yield put
    for job in jobs:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()


def begin(folder: Path, workdir: str, seconds: str, capsys) -> subprocess.Popen:
    """Runs the rendered script in the background, its output in ``folder``/log."""
    program = f"{sys.executable} -m m2jax"
    words = ["--config", str(CONFIG), "--workdir", workdir, "--nodes", "1", "--tasks-per-node", "2"]
    words += ["--program", program, "--env", f"TOY_SECONDS={seconds}"]
    assert main(["launch", "mpi", *words]) == 0
    (folder / "job.sh").write_text(capsys.readouterr().out)
    ours = ("JAX_COMPILATION_CACHE_DIR", "PJRT_NPROC")  # see test_slurm.py
    environ = {k: v for k, v in os.environ.items() if k not in ours} | {
        "XLA_FLAGS": harness.QUICK_COMPILES,
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(
            ["bash", "job.sh"],
            cwd=folder,
            env=environ,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def trace(folder: Path) -> list[tuple]:
    lines = (folder / "metrics.jsonl").read_text().split("\n")[:-1]
    rows = [json.loads(line) for line in lines]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]


def test_told_to_end_it_saves_and_goes_on_later(tmp_path, start) -> None:
    assert start("whole", "0").wait(180) == 0, (tmp_path / "log").read_text()
    log = (tmp_path / "log").read_text()
    assert "process 1 of 2" in log
    assert "process 2 of 2" in log
    assert "via openmpi" in log

    job = start("cut", "0.5")
    end = time.monotonic() + 120
    while not (tmp_path / "cut" / "metrics.jsonl").exists() or len(trace(tmp_path / "cut")) < 3:
        assert time.monotonic() < end
        assert job.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.2)
    job.send_signal(signal.SIGTERM)
    assert job.wait(60) == 42, (tmp_path / "log").read_text()
    assert 3 <= len(trace(tmp_path / "cut")) < 20

    assert start("cut", "0").wait(180) == 0
    assert trace(tmp_path / "cut") == trace(tmp_path / "whole")
