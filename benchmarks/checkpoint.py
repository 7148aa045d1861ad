# SPDX-License-Identifier: Apache-2.0
"""What checkpoints cost the demo: how long saving blocks the loop, and its share of the CPU's time.

    python benchmarks/checkpoint.py [--steps 100] [--every 10] [--repeats 4]

Runs the demo's own step (``configs/emoji.py``, random rows), without saves and with a save every N
steps, in turn. *Blocked*: time inside ``Checkpoints.save``, in which no step is handed out. *CPU*:
CPU seconds of the whole process, threads that write included, beyond those of the trial without
saves. Saves come often so that their cost stands out of the noise; the table gives their share at
the intervals that matter.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from m2jax.checkpoint.manager import Checkpoints
from m2jax.config_files import load_config
from m2jax.dist.bootstrap import start
from m2jax.dist.mesh import make_mesh
from m2jax.dist.sharding import batch_sharding
from m2jax.train.main import assemble, use_cpu_devices

ASSETS = {"tokenizer": {}, "preprocess": {}}


def batch_of(task, experiment, mesh):
    """One batch of random rows, used by every step."""
    rng, places = np.random.default_rng(0), batch_sharding(mesh)
    batch = {}
    for name, leaf in task.batch_spec(experiment.data.batch_size).items():
        high = 2 if leaf.dtype == np.bool_ else 200
        rows = rng.integers(0, high, leaf.shape).astype(leaf.dtype)
        batch[name] = jax.make_array_from_process_local_data(places, rows)
    return batch


def trial(experiment, step, batch, steps, every):
    """Seconds of the loop, seconds blocked in saves, CPU seconds; saves are waited for."""
    state = step.init()
    state, metrics = step.run(state, batch)
    jax.block_until_ready(metrics)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder), experiment, ASSETS)
        begin, cpu, blocked = time.perf_counter(), time.process_time(), 0.0
        for number in range(1, steps + 1):
            state, metrics = step.run(state, batch)
            if number % experiment.train.log_every == 0:
                float(metrics["loss"])
            if every and number % every == 0:
                jax.block_until_ready(state)  # what is counted is the save, not the step before it
                now = time.perf_counter()
                checkpoints.save(number, state, {"next_index": number})
                blocked += time.perf_counter() - now
        jax.block_until_ready(state)
        seconds = time.perf_counter() - begin
        checkpoints.wait()
        cpu = time.process_time() - cpu
        checkpoints.close()
    return seconds, blocked, cpu


def main():
    """Prints the costs of a step and of a save, medians over the repeats, and their shares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=4)
    args = parser.parse_args()
    experiment = load_config("emoji")
    use_cpu_devices(experiment)
    start(quiet=True)
    mesh = make_mesh(experiment.mesh)
    task, step = assemble(experiment, mesh)
    batch = batch_of(task, experiment, mesh)
    with_saves, without = [], []
    for _ in range(args.repeats):
        without.append(trial(experiment, step, batch, args.steps, 0))
        with_saves.append(trial(experiment, step, batch, args.steps, args.every))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(step.init()))
    saves = args.steps // args.every
    step_s, _, step_cpu = np.median(without, axis=0) / args.steps
    spread = np.ptp([cpu for _, _, cpu in without]) / saves
    block = np.median([blocked for _, blocked, _ in with_saves]) / saves
    more = np.median([a[2] - b[2] for a, b in zip(with_saves, without, strict=True)]) / saves
    print(f"{size / 1e6:.1f} MB of state, {os.cpu_count()} cores, {saves} saves in a trial")
    print(f"step {1e3 * step_s:.0f} ms and {step_cpu:.3f} CPU s")
    print(f"a save blocks {1e3 * block:.1f} ms and takes {more:.3f} CPU s (noise {spread:.3f})")
    print("| save every | loop blocked % | CPU % |\n|---|---|---|")
    for every in (50, 200):
        blocked = block / (every * step_s + block)
        print(f"| {every} | {100 * blocked:.2f} | {100 * more / (every * step_cpu):.2f} |")


if __name__ == "__main__":
    main()
