# SPDX-License-Identifier: Apache-2.0
"""Times the contrastive reductions over real processes: gloo collectives between CPU processes.

    python benchmarks/contrastive_processes.py [--processes 8] [--rows 256] [--impl ...]

Starts the processes on this machine, one device each, and prints milliseconds of value and gradient
of the loss alone, and of a whole training step of a small M2-Encoder, for each reduction. The
reductions take turns, so that a slow minute of the machine meets all of them; the last column is
the median over the turns of the first one's step time over this one's.
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
from jax.experimental.multihost_utils import process_allgather

from m2jax import config, load_config
from m2jax.dist.bootstrap import start
from m2jax.dist.mesh import make_mesh
from m2jax.dist.sharding import batch_sharding
from m2jax.losses.contrastive import contrastive_loss
from m2jax.train.image_text import ImageTextTask
from m2jax.train.step import make_step

IMPLS = ("dense", "local", "chunked", "ring", "grid", "grouped")
ROUNDS = 7


def clock(function, *args):
    """One run, in ms."""
    begin = time.perf_counter()
    jax.block_until_ready(function(*args))
    return 1e3 * (time.perf_counter() - begin)


def spread(mesh, tree):
    """This process's rows of a global batch made of the same numbers on each."""
    places = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(places, x), tree)


def loss_run(mesh, impl, group, args):
    """Times one run of the loss alone; checks that every process got the same value."""
    rng = np.random.default_rng(jax.process_index())
    image, text = rng.normal(size=(2, args.rows, args.dim)).astype(np.float32)
    image, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text))

    def loss(image, text, scale):
        return contrastive_loss(image, text, scale, impl=impl, mesh=mesh, group=group)

    function = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    inputs = (*spread(mesh, (image, text)), jnp.float32(14.3))
    value, _ = function(*inputs)
    values = process_allgather(np.asarray(value.addressable_data(0)))
    if np.ptp(values):
        raise SystemExit(f"{impl}: the processes disagree about the loss: {values}")
    return float(values[0]), lambda: clock(function, *inputs)


def step_run(mesh, impl, group, args):
    """Times one run of the real training step, on random rows."""
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

    jax.block_until_ready(once())
    return lambda: clock(once)


def worker(args):
    """One of the processes: everything is compiled first, then timed in turns."""
    start(quiet=True)
    mesh, times, values = make_mesh(config.Mesh()), {}, {}
    for impl in args.impl:
        group = max(1, mesh.size // 4) if impl == "grouped" else None
        values[impl], alone = loss_run(mesh, impl, group, args)
        times[impl] = (alone, [], step_run(mesh, impl, group, args), [])
    for _ in range(args.rounds):
        for alone, of_loss, step, of_step in times.values():
            of_loss.append(alone())
            of_step.append(step())
    if jax.process_index() == 0:
        base = times[args.impl[0]]
        for impl, (_, of_loss, _, of_step) in times.items():
            ratio = np.median(np.asarray(base[3]) / np.asarray(of_step))
            cells = [min(of_loss), np.median(of_loss), min(of_step), np.median(of_step)]
            line = " | ".join(f"{cell:.0f}" for cell in cells)
            print(f"| {impl} | {values[impl]:.6f} | {line} | {ratio:.2f} |", flush=True)


def main():
    """Starts the processes, or is one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--rows", type=int, default=256, help="of each process")
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--impl", nargs="+", default=IMPLS, choices=IMPLS)
    args = parser.parse_args()
    if "M2JAX_PROCESS_ID" in os.environ:
        return worker(args)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    heads = ("impl", "loss", "loss ms, least", "median", "step ms, least", "median")
    print("| " + " | ".join(heads), f"| steps in the time of one with {args.impl[0]} |")
    print("|---" * 7 + "|", flush=True)
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
    try:
        raise SystemExit(max(abs(peer.wait()) for peer in peers))
    finally:  # interrupted: a TERM alone would ask them for a save that nobody makes
        for peer in peers:
            peer.kill()


if __name__ == "__main__":
    main()
