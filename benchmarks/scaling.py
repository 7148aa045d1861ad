# SPDX-License-Identifier: Apache-2.0
"""Weak scaling over processes: what a step costs more because others take part in it.

    python benchmarks/scaling.py [--processes 1 2 4] [--rows 32] [--rounds 5] [--steps 3]

Every process holds the same rows, so N processes do N times the work on the same cores. To tell the
cost of taking part from that of sharing cores, each process runs two steps in turn, at the same
time as all others: *alone*, the whole step of its own rows on a mesh of its own device; and
*together*, the step of the global batch over all processes (gradients reduced and the contrast
gathered by gloo). Overhead is the median over the rounds of together / alone - 1: collectives, and
waiting for the slowest. With one process nothing is sent: its row shows the noise. Between the two
the collectives run by themselves: one all-reduce per parameter, as of the gradients, and nothing to
wait for but each other. What they take of *together* is the collectives' share; the rest of the
overhead is waiting, since no process goes on before the slowest has come.
"""

import argparse
import dataclasses
import functools
import os
import socket
import subprocess
import sys
import time

import jax
import numpy as np
from jax.experimental.multihost_utils import sync_global_devices
from jax.sharding import PartitionSpec as P

from m2jax import config, load_config
from m2jax.dist.bootstrap import start
from m2jax.dist.mesh import make_mesh
from m2jax.dist.sharding import batch_sharding
from m2jax.train.image_text import ImageTextTask
from m2jax.train.step import make_step


def stepper(mesh, args):
    """A function that takes some steps of the demo's model and returns ms per step."""
    base = load_config("emoji", ["data.views=1", "train.log_every=1", "mesh.cpu_devices=0"])
    data = dataclasses.replace(base.data, batch_size=args.rows * mesh.size)
    cfg = dataclasses.replace(base, data=data, mesh=config.Mesh())
    task = ImageTextTask(cfg, mesh)
    step, places = make_step(cfg, task, mesh), batch_sharding(mesh)
    rng, state, batch = np.random.default_rng(jax.process_index()), step.init(), {}
    for name, leaf in task.batch_spec(args.rows).items():
        high = 2 if leaf.dtype == np.bool_ else 200
        rows = rng.integers(0, high, leaf.shape).astype(leaf.dtype)
        batch[name] = jax.make_array_from_process_local_data(places, rows)

    def take():
        nonlocal state
        begin = time.perf_counter()
        for _ in range(args.steps):
            state, metrics = step.run(state, batch)
            jax.block_until_ready(metrics)
        return 1e3 * (time.perf_counter() - begin) / args.steps

    take()
    return take


def reducer(mesh, args):
    """A function that all-reduces what has the gradients' shapes, and returns ms per time."""
    cfg = load_config("emoji", ["data.views=1", "mesh.cpu_devices=0"])
    gradients = make_step(cfg, ImageTextTask(cfg, mesh), mesh).init().params

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    def reduce(tree):
        return jax.tree.map(lambda leaf: jax.lax.psum(leaf, mesh.axis_names), tree)

    def take():
        begin = time.perf_counter()
        for _ in range(args.steps):
            jax.block_until_ready(reduce(gradients))
        return 1e3 * (time.perf_counter() - begin) / args.steps

    take()
    return take


def worker(args):
    """One of the processes."""
    start(quiet=True)
    everyone = make_mesh(config.Mesh())
    timed = {
        "alone": stepper(make_mesh(config.Mesh(), jax.local_devices()), args),
        "reduce": reducer(everyone, args),
        "together": stepper(everyone, args),
    }
    times = []
    for turn in range(args.rounds):
        times.append([])
        for name, take in timed.items():
            sync_global_devices(f"{name} {turn}")
            times[-1].append(take())
    if jax.process_index() == 0:
        alone, reduced, together = np.asarray(times).T
        overhead = together / alone - 1
        cells = [jax.process_count()]
        cells += [f"{np.median(x):.0f}" for x in (alone, together, reduced)]
        cells += [f"{100 * np.median(x):.1f} %" for x in (overhead, reduced / together)]
        cells += [f"{100 * overhead.min():.1f} to {100 * overhead.max():.1f} %"]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def run(count, words):
    """Starts the processes of one row and waits for them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    common = {"M2JAX_COORDINATOR": address, "M2JAX_NUM_PROCESSES": str(count)}
    common |= {"JAX_PLATFORMS": "cpu"}
    peers = [
        subprocess.Popen(
            [sys.executable, __file__, *words],
            env=os.environ | common | {"M2JAX_PROCESS_ID": str(index)},
        )
        for index in range(count)
    ]
    try:
        if any([peer.wait() for peer in peers]):
            raise SystemExit("a process failed")
    finally:
        for peer in peers:
            peer.kill()


def main():
    """Starts the processes, or is one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rows", type=int, default=32, help="of each process")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="of a round")
    args = parser.parse_args()
    if "M2JAX_PROCESS_ID" in os.environ:
        return worker(args)
    heads = ("processes", "alone, ms a step", "together", "collectives by themselves")
    heads += ("overhead", "collectives' share of together", "overhead of the rounds")
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|", flush=True)
    for count in args.processes:
        run(count, sys.argv[1:])
    return None


if __name__ == "__main__":
    main()
