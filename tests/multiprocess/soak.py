# SPDX-License-Identifier: Apache-2.0
"""Kills a run again and again, at random, and compares what it learned with a run left alone.

    python -m tests.multiprocess.soak [--kills 20] [--seed 0] [--processes 2] [--devices 2]

Each time one process or all of them get SIGKILL, within a random step or within the save after
it; then the run is started again, as a scheduler would. Losses, gradient norms and the ids of the
samples of every step must come out equal to the last bit. Prints a row per kill; exit code 1 on a
difference.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.multiprocess import harness

EVERY = 4  # steps between saves, as toy_config.py says


def newest(workdir: Path) -> int:
    """The step of the newest complete checkpoint; 0 if there is none."""
    steps = [int(p.name) for p in workdir.glob("checkpoints/*") if p.name.isdigit()]
    return max(steps, default=0)


def draw(rng: random.Random, start: int, processes: int) -> dict:
    """A kill at one of the next eight steps, or in the save after one of them."""
    step = start + rng.randint(1, 2 * EVERY)
    saving = rng.random() < 0.5
    return {
        "kind": "kill",
        "step": -(-step // EVERY) * EVERY if saving else step,
        "saving": saving,
        "process": rng.choice([-1, *range(processes)]),
        "after": rng.uniform(0, 0.3),
    }


def describe(fault: dict) -> str:
    """One cell of the table."""
    who = "all" if fault["process"] < 0 else f"process {fault['process']}"
    when = "save" if fault["saving"] else "step"
    return f"{who}, {when} {fault['step']} + {fault['after'] * 1e3:.0f} ms"


def soak(workdir: Path, args: argparse.Namespace) -> bool:
    """Runs both; whether they are equal."""
    rng = random.Random(args.seed)
    steps = (args.kills + 1) * 2 * EVERY  # more than the kills can let it get to
    shape = args.processes, args.devices, f"train.steps={steps}"
    begin = time.monotonic()
    codes = harness.launch(workdir / "whole", *shape).wait()
    assert codes == [0] * args.processes, codes
    print(f"uninterrupted: {steps} steps in {time.monotonic() - begin:.0f} s", flush=True)
    print("| kill | from step | what | exit codes | seconds |\n|---|---|---|---|---|", flush=True)
    cut = workdir / "cut"
    for number in range(1, args.kills + 1):
        start, begin = newest(cut), time.monotonic()
        fault = draw(rng, start, args.processes)
        codes = harness.launch(cut, *shape, faults=(fault,)).wait(grace_s=args.grace)
        seconds = time.monotonic() - begin
        print(f"| {number} | {start} | {describe(fault)} | {codes} | {seconds:.0f} |", flush=True)
        if -9 not in codes:
            print("nobody was killed")
            return False
    codes = harness.launch(cut, *shape).wait()
    same = {
        "exit codes": codes == [0] * args.processes,
        "losses": harness.losses(cut) == harness.losses(workdir / "whole"),
        "samples": harness.samples(cut) == harness.samples(workdir / "whole"),
        "each sample once": harness.consecutive(harness.samples(cut)),
    }
    print(", ".join(f"{name}: {'equal' if ok else 'DIFFERENT'}" for name, ok in same.items()))
    return all(same.values())


def main() -> int:
    """Parses, runs, in a folder that goes again."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=2, help="of each process")
    parser.add_argument("--grace", type=float, default=30, help="seconds survivors have to end")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return 0 if soak(Path(folder), args) else 1


if __name__ == "__main__":
    sys.exit(main())
