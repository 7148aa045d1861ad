# SPDX-License-Identifier: Apache-2.0
"""M2-Encoder 10B from scratch on a TPU slice or a GPU cluster; the argument picks the machine.

``configs/pretrain_10b.py:v5p-128``. Numbers count chips: Google's own names for v4 and v5p slices
count cores, two per chip. ``m2jax plan`` proves a machine's row (benchmarks/plan.md).
"""

from ml_collections import ConfigDict

from m2jax.config import as_config_dict

# Machine -> devices per mesh axis, rows per chip and step, what the backward pass recomputes.
# Weights lie over the 16 chips of one plane (8 GPUs of one host) and are gathered layer by layer;
# only gradients cross the rest. Flat sharding over all chips doubles the bytes sent.
MACHINES = {
    "v5p-128": ({"data": 8, "fsdp": 16}, 192, "attention"),  # 4x4x8
    "v5p-512": ({"data": 32, "fsdp": 16}, 192, "attention"),  # 8x8x8
    "v6e-256": ({"data": 16, "fsdp": 16}, 128, "full"),  # 16x16
    "h100-8": ({"fsdp": 8}, 384, "full"),
    "h100-256": ({"data": 32, "fsdp": 8}, 256, "full"),
    "h200-8": ({"fsdp": 8}, 768, "full"),
    "h200-256": ({"data": 32, "fsdp": 8}, 256, "attention"),
}


def get_config(arg: str = "v5p-128") -> ConfigDict:
    """The run on one of ``MACHINES``."""
    if arg not in MACHINES:
        raise ValueError(f"{arg!r}: no such machine: use one of {', '.join(MACHINES)}")
    mesh, rows, remat = MACHINES[arg]
    config = as_config_dict()
    config.model.name = "m2-encoder-10b"
    config.model.remat = remat
    config.model.attention = "cudnn" if arg.startswith("h") else "batch"
    config.model.fused_qkv = False  # three products model faster than one that is cut
    config.mesh.update(mesh)
    if arg in ("h100-256", "h200-256"):
        config.loss.contrastive.impl = "grid"  # exact, an eighth of the bytes between hosts
        config.loss.contrastive.group = 8  # a host: whole axes alone go with cuDNN
    config.data.batch_size = rows * int(arg.split("-")[1])
    config.data.name = "shards"  # name them: --config.data.files='("/data/shards",)'
    config.data.languages = ("any",)  # one caption a picture, in whichever language it has
    config.optim.learning_rate = 5e-4
    config.optim.warmup_steps = 2_000
    config.optim.weight_decay = 0.05
    config.train.steps = 200_000
    config.train.log_every = 50
    config.train.guard.factor = 4.0
    config.train.guard.warmup_steps = 2_000
    config.checkpoint.every = 1_000
    config.eval.suite = ""
    return config
