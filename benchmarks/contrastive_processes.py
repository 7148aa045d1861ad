# SPDX-License-Identifier: Apache-2.0
"""Times the contrastive reductions over real processes: gloo collectives between CPU processes.

    python benchmarks/contrastive_processes.py [--processes 8] [--rows 256] [--impl ...]

Starts the processes on this machine, one device each, and prints milliseconds of value and gradient
of the loss alone, and of a whole training step of a small M2-Encoder, for each reduction.
``grouped`` takes groups of a quarter of the processes.
"""

import argparse
import dataclasses
import os
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from m2jax import config, load_config
from m2jax.dist.bootstrap import start
from m2jax.dist.mesh import make_mesh
from m2jax.dist.sharding import batch_sharding
from m2jax.losses.contrastive import contrastive_loss
from m2jax.train.image_text import ImageTextTask
from m2jax.train.step import make_step

IMPLS = ("dense", "local", "chunked", "ring", "grid", "grouped")
RUNS = 5


def clock(function, *args):
    """Least and median of several runs, in ms; the first is the compilation's."""
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(RUNS):
        begin = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(1e3 * (time.perf_counter() - begin))
    return min(times), float(np.median(times))


def spread(mesh, tree):
    """This process's rows of a global batch made of the same numbers on each."""
    places = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(places, x), tree)


def loss_times(mesh, impl, group, args):
    """Of the loss alone."""
    rng = np.random.default_rng(jax.process_index())
    image, text = rng.normal(size=(2, args.rows, args.dim)).astype(np.float32)
    image, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text))

    def loss(image, text, scale):
        return contrastive_loss(image, text, scale, impl=impl, mesh=mesh, group=group)

    function = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    return clock(function, *spread(mesh, (image, text)), jnp.float32(14.3))


def step_times(mesh, impl, group, args):
    """Of the real training step, on random rows."""
    base = load_config("emoji", ["data.views=1", "train.log_every=1"])
    size = {"width": 64, "heads": 2, "backbone_layers": 1, "vl_layers": 1, "out_dim": args.dim}
    model = config.resolve(dataclasses.replace(base.model, **size))
    loss = config.Loss(contrastive=config.Contrastive(impl=impl, group=group or 0))
    data = dataclasses.replace(base.data, batch_size=args.rows * mesh.size)
    cfg = dataclasses.replace(base, model=model, data=data, loss=loss, mesh=config.Mesh())
    task = ImageTextTask(cfg, mesh)
    step = make_step(cfg, task, mesh)
    rng, state = np.random.default_rng(jax.process_index()), step.init()
    batch = {}
    for name, leaf in task.batch_spec(args.rows).items():
        high = 2 if leaf.dtype == jnp.bool_ else 200
        batch[name] = rng.integers(0, high, leaf.shape).astype(leaf.dtype)
    batch = spread(mesh, batch)

    def once():
        nonlocal state
        state, metrics = step.run(state, batch)
        return metrics

    return clock(once)


def worker(args):
    """One of the processes."""
    start(quiet=True)
    mesh = make_mesh(config.Mesh())
    for impl in args.impl:
        group = max(1, mesh.size // 4) if impl == "grouped" else None
        alone, step = loss_times(mesh, impl, group, args), step_times(mesh, impl, group, args)
        if jax.process_index() == 0:
            print(
                f"| {impl} | {alone[0]:.0f} | {alone[1]:.0f} | {step[0]:.0f} | {step[1]:.0f} |",
                flush=True,
            )


def main():
    """Starts the processes, or is one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--rows", type=int, default=256, help="of each process")
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--impl", nargs="+", default=IMPLS, choices=IMPLS)
    args = parser.parse_args()
    if "M2JAX_PROCESS_ID" in os.environ:
        return worker(args)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    print("| impl | loss ms, least | median | step ms, least | median |\n|---|---|---|---|---|")
    peers = []
    for index in range(args.processes):
        variables = {
            "M2JAX_COORDINATOR": address,
            "M2JAX_NUM_PROCESSES": str(args.processes),
            "M2JAX_PROCESS_ID": str(index),
            "JAX_PLATFORMS": "cpu",
            # Losses of one step are independent loops; side by side, processes ran their
            # collectives in different orders and gloo aborted (message sizes did not match).
            "XLA_FLAGS": "--xla_cpu_enable_concurrency_optimized_scheduler=false",
        }
        peers.append(subprocess.Popen([sys.executable, *sys.argv], env=os.environ | variables))
    raise SystemExit(max(abs(peer.wait()) for peer in peers))


if __name__ == "__main__":
    main()
