# SPDX-License-Identifier: Apache-2.0
"""Times ``make demo`` as a new user meets it: fresh clone, new environment, empty data folder.

    python benchmarks/demo.py [--folder DIR]

Takes about ten minutes and needs the package registries. Prints when the first line with a loss
was on the screen, how long the training loop and the whole took, and the accuracy it ended with.
"""

import argparse
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEAD = "| commit | first loss s | loop s | whole s | fluent seen top-1 en, zh | pixel neighbour |"


def main():
    """Clones, runs, prints a row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where to clone to; a temporary one if absent")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="m2jax-demo-"))
    clone = folder / "m2jax"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    commit = ["git", "-C", str(clone), "rev-parse", "--short", "HEAD"]
    name = subprocess.run(commit, capture_output=True, text=True, check=True).stdout.strip()

    begin = time.monotonic()
    first = None
    command = ["make", "-C", str(clone), "demo"]
    env = {**os.environ, "M2JAX_DATA": str(folder / "data")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=env, **pipes) as demo:
        for line in demo.stdout:
            print(line, end="", flush=True)
            if first is None and "loss" in line:
                first = time.monotonic() - begin
    whole = time.monotonic() - begin
    if demo.returncode:
        raise SystemExit(f"make demo: exit code {demo.returncode}, in {clone}")
    found = json.loads((clone / "runs/demo/metrics.json").read_text())
    scores = [100 * found[f"zero_shot/fluent/seen/{lang}/top1"] for lang in ("en", "zh")]
    neighbour = 100 * found["baseline/pixel_nn/fluent/top1"]
    print(f"\n{HEAD}\n|{'---|' * 6}")
    print(
        f"| {name} | {first:.0f} | {found['train/seconds']:.0f} | {whole:.0f} | "
        f"{scores[0]:.1f}, {scores[1]:.1f} | {neighbour:.1f} |"
    )


if __name__ == "__main__":
    main()
