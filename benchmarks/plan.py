# SPDX-License-Identifier: Apache-2.0
"""Plans every shipped pretraining config for every machine it names: rows of benchmarks/plan.md.

    python benchmarks/plan.py [--folder runs/plans] [--only 10b:v5p-128 ...]

Each plan is a ``m2jax plan`` of its own and lands as JSON in the folder; what is there already is
not planned again, so an interrupted run goes on. The rows of all that is there are printed at the
end. A 10B plan takes one to two minutes of two cores and 4 GB; GPU machines need JAX's CUDA plugin.
"""

import argparse
import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path

from m2jax import load_config

SIZES = ("0p4b", "1b", "10b")
TOPOLOGIES = {
    "v5p-128": "v5p:4x4x8",
    "v5p-512": "v5p:8x8x8",
    "v6e-256": "v6e:16x16",
    "h100-8": "h100:8",
    "h100-256": "h100:32x8",
    "h200-8": "h200:8",
    "h200-256": "h200:32x8",
}
COLUMNS = (
    "config", "mesh", "rows/chip", "fits", "state + temporaries (+ batch) = total GiB of limit",
    "sent GiB", "compute s", "not hidden s", "step s", "MFU", "MFU compute only", "compile s",
)  # fmt: skip
GIB = 2**30


def make(name: str, folder: Path) -> None:
    """Plans one ``SIZE:MACHINE`` unless its JSON is there."""
    size, machine = name.split(":")
    file = place(name, folder)
    if file.exists():
        return
    words = ["--config", f"configs/pretrain_{size}.py:{machine}", "--json", str(file)]
    command = [sys.executable, "-m", "m2jax", "plan", "--topology", TOPOLOGIES[machine], *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 3):
        print(f"{name}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)


def place(name: str, folder: Path) -> Path:
    """Where a plan lies, by its name and config: a changed config is planned anew."""
    size, machine = name.split(":")
    settings = dataclasses.asdict(load_config(f"configs/pretrain_{size}.py:{machine}"))
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return folder / f"{size}-{machine}-{digest}.json"


def row(name: str, plan: dict) -> str:
    """One line of the table."""
    memory, seconds = plan["bytes_per_chip"], plan["seconds"]
    state = memory["parameters"] + memory["optimizer"]
    sizes = [state, memory["temporaries"], memory["total"], memory["limit"]]
    gib = "{:.1f} + {:.1f} = {:.1f} of {:.1f}".format(*(size / GIB for size in sizes))
    mesh = " ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1)
    cells = [name, mesh, f"{plan['batch_size'] / plan['chips']:g}", "yes" if plan["fits"] else "NO"]
    cells += [gib, f"{plan['sent_bytes_per_chip'] / GIB:.1f}"]
    if seconds:
        waiting = seconds["total"] - seconds["compute"]
        cells += [f"{value:.2f}" for value in (seconds["compute"], waiting, seconds["total"])]
        cells += [f"{100 * plan[key]:.1f} %" for key in ("mfu", "mfu_compute_only")]
    else:
        cells += ["-"] * 5
    return "| " + " | ".join([*cells, f"{plan['compile_seconds']:.0f}"]) + " |"


def main() -> None:
    """Plans and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/plans"))
    parser.add_argument("--only", nargs="+", metavar="SIZE:MACHINE")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    every = [f"{size}:{machine}" for size in SIZES for machine in TOPOLOGIES]
    for name in args.only or every:
        make(name, args.folder)
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    for name in every:
        file = place(name, args.folder)
        if file.exists():
            print(row(name, json.loads(file.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
