# SPDX-License-Identifier: Apache-2.0
"""From ``m2jax launch slurm --submit`` to the first logged step, on a local Slurm: where time goes.

    python -m benchmarks.launch [--config configs/emoji.py] [--nodes 2] [--tasks-per-node 1]

Starts a Slurm of several nodes on this machine (Debian's packages, root; see tests/launch/slurm.py)
and prints one line. The processes share this machine's cores; run it with nothing else on them.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.launch import slurm

ROOT = Path(__file__).parents[1]


def main() -> int:
    """Measures one start."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=str(ROOT / "configs" / "emoji.py"))
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--tasks-per-node", type=int, default=1)
    args = parser.parse_args()
    if slurm.missing():
        raise SystemExit(slurm.missing())
    with slurm.cluster(args.nodes) as cluster, tempfile.TemporaryDirectory() as folder:
        times = measure(cluster, Path(folder), args)
    print(" | ".join(f"{name} {seconds:.1f} s" for name, seconds in times.items()))
    return 0


def measure(cluster: slurm.Cluster, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of each part of the way, by what the run's log and rows say."""
    words = ["launch", "slurm", "--config", args.config, "--nodes", str(args.nodes)]
    words += ["--tasks-per-node", str(args.tasks_per_node), "--workdir", "run", "--submit"]
    words += ["--program", f"{sys.executable} -m m2jax"]
    words += ["--config.train.steps=3", "--config.train.log_every=1", "--config.eval.suite="]
    environ = cluster.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    begun = time.time()
    told = subprocess.run(
        [sys.executable, "-m", "m2jax", *words],
        cwd=folder, env=environ, capture_output=True, text=True, check=True,
    )  # fmt: skip
    submitted = time.time()
    number = re.search(r"batch job (\d+)", told.stdout)
    assert number is not None
    job = int(number[1])
    log = folder / f"{Path(args.config).stem}-{job}.log"
    rows = folder / "run" / "metrics.jsonl"
    slurm.until(lambda: cluster.show(job)["JobState"] == "RUNNING", 60)
    running = time.time()
    slurm.until(lambda: log.exists() and "process 1 of" in log.read_text(), 200)
    joined = time.time()
    slurm.until(lambda: rows.exists() and rows.read_text().count("\n") >= 1, 300)
    first = time.time()
    cluster.wait(job, "COMPLETED", "FAILED", seconds=200)
    return {
        "check and submit": submitted - begun,
        "queue": running - submitted,
        "start and join": joined - running,
        "data, compile, first step": first - joined,
        "together": first - begun,
    }


if __name__ == "__main__":
    sys.exit(main())
