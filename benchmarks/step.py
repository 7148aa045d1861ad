# SPDX-License-Identifier: Apache-2.0
"""Times the training step of a config on random batches, beside this machine's matrix product.

    python benchmarks/step.py [--config emoji] [key=value ...]

Prints one table row: milliseconds per step (least and median), samples per second, the arithmetic
of the matrix products alone (6 x parameters x tokens) and its share of a 2048-cubed product's rate
measured in the same process.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from m2jax.config_files import load_config
from m2jax.dist.mesh import make_mesh
from m2jax.dist.sharding import batch_sharding
from m2jax.train.image_text import ImageTextTask
from m2jax.train.main import use_cpu_devices
from m2jax.train.step import make_step

STEPS = 12


def peak_flops_per_s(side=2048, runs=10):
    """The best rate of a float32 matrix product here."""
    x = jnp.ones((side, side))
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * side**3 / min(times)


def matmul_flops(experiment):
    """Forward and backward of the layers' matrix products and the patch embedding."""
    model, data = experiment.model, experiment.data
    layers = model.backbone_layers + model.vl_layers
    image = (model.image_size // model.patch_size) ** 2 + 1
    text = len(data.languages) * model.max_text_len
    tokens = data.batch_size * (data.views * image + text)
    patches = data.batch_size * data.views * image * 3 * model.patch_size**2 * model.width
    return 6 * (tokens * layers * 12 * model.width**2 + patches)


def random_batch(spec, rng):
    """Numbers in the shapes of a batch."""
    made = {}
    for name, leaf in spec.items():
        high = 2 if leaf.dtype == jnp.bool_ else 256 if leaf.dtype == jnp.uint8 else 1000
        made[name] = rng.integers(0, high, leaf.shape).astype(leaf.dtype)
    return made


def main():
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="emoji")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    experiment = load_config(args.config, args.overrides)
    use_cpu_devices(experiment)
    mesh = make_mesh(experiment.mesh)
    task = ImageTextTask(experiment, mesh)
    step = make_step(experiment, task, mesh)
    size = experiment.data.batch_size
    batch = random_batch(task.batch_spec(size), np.random.default_rng(0))
    batch = jax.device_put(batch, batch_sharding(mesh))
    state, metrics = step.run(step.init(), batch)
    jax.block_until_ready(metrics)
    times = []
    for _ in range(STEPS):
        start = time.perf_counter()
        state, metrics = step.run(state, batch)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - start)
    rate, peak = matmul_flops(experiment) / min(times), peak_flops_per_s()
    print(
        f"| {' '.join(args.overrides) or 'as shipped'} | {1e3 * min(times):.0f} | "
        f"{1e3 * np.median(times):.0f} | {size * experiment.data.views / min(times):.0f} | "
        f"{rate / 1e9:.0f} | {100 * rate / peak:.0f} % of {peak / 1e9:.0f} |"
    )


if __name__ == "__main__":
    main()
