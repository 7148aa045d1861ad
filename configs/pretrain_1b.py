# SPDX-License-Identifier: Apache-2.0
"""M2-Encoder 1B from scratch on a TPU slice or a GPU cluster; the argument picks the machine.

``configs/pretrain_1b.py:v5p-128``. Numbers count chips: Google's own names for v4 and v5p slices
count cores, two per chip. ``m2jax plan`` proves a machine's row (benchmarks/plan.md).
"""

from ml_collections import ConfigDict

from m2jax.config import as_config_dict

# Machine -> devices per mesh axis, rows per chip and step, what the backward pass recomputes,
# layers per iteration of the scan. Weights lie over 4 neighbouring chips (the 8 GPUs of a host) and
# are gathered layer by layer. On v5p and on GPUs every layer is written out and keeps its
# activations: by the plan a third less compute on v5p, and on GPUs, with cuDNN's attention, half;
# for one to three minutes of compiling. v6e's compiler takes fifteen for it.
MACHINES = {
    "v5p-128": ({"data": 32, "fsdp": 4}, 256, "none", 24),  # 4x4x8
    "v5p-512": ({"data": 128, "fsdp": 4}, 64, "none", 24),  # 8x8x8
    "v6e-256": ({"data": 64, "fsdp": 4}, 128, "products", 1),  # 16x16
    "h100-8": ({"fsdp": 8}, 256, "none", 24),
    "h100-256": ({"data": 32, "fsdp": 8}, 128, "none", 24),
    "h200-8": ({"fsdp": 8}, 512, "none", 24),
    "h200-256": ({"data": 32, "fsdp": 8}, 128, "none", 24),
}


def get_config(arg: str = "v5p-128") -> ConfigDict:
    """The run on one of ``MACHINES``."""
    if arg not in MACHINES:
        raise ValueError(f"{arg!r}: no such machine: use one of {', '.join(MACHINES)}")
    mesh, rows, remat, unroll = MACHINES[arg]
    config = as_config_dict()
    config.model.name = "m2-encoder-1b"
    config.model.remat = remat
    config.model.unroll = unroll
    config.model.attention = "cudnn" if arg.startswith("h") else "batch"
    config.model.fused_qkv = False  # three products model faster than one that is cut
    config.mesh.update(mesh)
    if arg in ("h100-256", "h200-256"):
        config.loss.contrastive.impl = "grid"  # exact, an eighth of the bytes between hosts
        config.loss.contrastive.group = 8  # a host: whole axes alone go with cuDNN
    config.data.batch_size = rows * int(arg.split("-")[1])
    config.data.name = "shards"  # name them: --config.data.files='("/data/shards",)'
    config.data.languages = ("any",)  # one caption a picture, in whichever language it has
    config.optim.learning_rate = 8e-4
    config.optim.warmup_steps = 2_000
    config.optim.weight_decay = 0.05
    config.train.steps = 200_000
    config.train.log_every = 50
    config.train.guard.factor = 4.0
    config.train.guard.warmup_steps = 2_000
    config.checkpoint.every = 1_000
    config.eval.suite = ""
    return config
