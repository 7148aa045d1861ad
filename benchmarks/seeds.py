# SPDX-License-Identifier: Apache-2.0
"""Trains a config with several seeds and prints mean and spread of its scores.

    python benchmarks/seeds.py --out runs/seeds [--config emoji] [--seeds 0 1 2] [--config.a.b=V]

A seed whose folder under --out already holds metrics.json is not trained again, and `m2jax train`
resumes one that was cut off. Prints one row per score: mean, standard deviation over the seeds (n -
1 in the denominator), and each seed's figure, in per cent.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROWS = ("top1", "top5", "mean_recall")


def scores(file):
    """The figures worth a row, by name."""
    found = json.loads(file.read_text())
    return {
        name: 100 * value
        for name, value in found.items()
        if name.endswith(ROWS) and not name.startswith("train/")
    }


def main():
    """Trains what is missing, then prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--config", default="emoji")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args, overrides = parser.parse_known_args()
    runs = []
    for seed in args.seeds:
        folder = args.out / f"seed-{seed}"
        if not (folder / "metrics.json").exists():
            command = ["-m", "m2jax", "train", "--config", args.config, "--workdir", str(folder)]
            command += [f"--config.train.seed={seed}", *overrides]
            subprocess.run([sys.executable, *command], check=True)
        runs.append(scores(folder / "metrics.json"))
    seeds = " ".join(map(str, args.seeds))
    print(f"\n| score | mean | deviation | seeds {seeds} |\n|---|---|---|---|")
    for name in runs[0]:
        values = [run[name] for run in runs]
        spread = statistics.stdev(values) if len(values) > 1 else float("nan")
        each = " ".join(f"{value:.1f}" for value in values)
        print(f"| {name} | {statistics.fmean(values):.1f} | {spread:.1f} | {each} |")


if __name__ == "__main__":
    main()
