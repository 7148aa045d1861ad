# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Sharding, and a plan of a pod that is not here
#
# Where each parameter of the 10-billion-parameter model lies on 128 devices, a loss that never
# holds the matrix of logits, and the real training step compiled for a TPU slice, all on this
# CPU.

# %%
import os

# Eight devices out of one CPU; on a real machine these two lines are not there.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np

import m2jax

# %% [markdown]
# ## Parameters and their places
#
# Nothing is allocated. On the shell: `m2jax inspect --config pretrain_10b:v5p-128 --devices 128`
# %%
from m2jax.cli.inspect import layout

experiment = m2jax.load_config("pretrain_10b:v5p-128")
lines, sizes = layout(experiment, 128)
print(sizes)
for line in sorted(lines, key=lambda line: -np.prod(line.shape))[:8]:
    print(f"{line.name:28} {line.shape!s:24} {line.mesh_axes!s:42} {line.bytes_per_device:>12,}")
print(
    f"{sum(int(np.prod(line.shape)) for line in lines):,} parameters,",
    f"{sum(line.bytes_per_device for line in lines) / 2**30:.2f} GiB of them per device",
)

# %% [markdown]
# ## One loss, many ways to reduce it
#
# `dense` gathers everything; `ring` passes texts from device to device and holds one tile. Values
# and gradients agree, so the choice is about memory and links alone (`benchmarks/contrastive.md`).

# %%
mesh = m2jax.make_mesh(m2jax.Experiment().mesh)
keys = jax.random.split(jax.random.key(0))
image, text = (
    x / jnp.linalg.norm(x, axis=1, keepdims=True)
    for x in (jax.random.normal(key, (64, 32)) for key in keys)
)


def loss(impl):
    def of(image, text):
        return m2jax.contrastive_loss(image, text, jnp.float32(20.0), impl=impl, mesh=mesh)

    return jax.jit(jax.value_and_grad(of))(image, text)


dense, slope = loss("dense")
ring, other = loss("ring")
gap = float(jnp.abs(slope - other).max())
print(f"dense {float(dense):.6f}, ring {float(ring):.6f}, gradients within {gap:.0e}")

# %% [markdown]
# ## Does it fit, what does it send, how fast can it be?
#
# The compiler for TPUs runs on any Linux machine (`libtpu`, with `pip install "m2jax[tpu]"`).
# Here a small model on four chips, so that it takes seconds; `pretrain_10b.py:v5p-128` on
# `v5p:4x4x8` is the same call and takes two minutes.

# %%
import importlib.util

from m2jax.plan import planner, report

small = [
    *("model.width=64", "model.heads=4", "model.backbone_layers=1", "model.vl_layers=1"),
    *("mesh.fsdp=2", "mesh.cpu_devices=0", "data.batch_size=256", "data.views=1"),
    *("data.languages=('en',)", "optim.name=adamw"),
    *(f"data.augment.{name}=0." for name in vars(m2jax.load_config("emoji").data.augment)),
]
if importlib.util.find_spec("libtpu"):
    experiment = m2jax.load_config("emoji", small)
    plan = planner.plan(experiment, "v5e:2x2", contrastive=False)
    print(report.table([plan], ["four chips"]))
else:
    print('no compiler for TPUs here: pip install "m2jax[tpu]" on Linux')
