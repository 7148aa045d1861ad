# SPDX-License-Identifier: Apache-2.0
"""The demo: a small M2-Encoder on drawings by five vendors, in English and Chinese, on two cores.

Chosen on held-out training styles alone (benchmarks/emoji.md).
"""

from ml_collections import ConfigDict

from m2jax.config import as_config_dict


def get_config() -> ConfigDict:
    """The run of ``make demo``."""
    config = as_config_dict()
    config.model.init = "scaled"
    config.model.dtype = "float32"  # faster than bfloat16 on CPUs without matrix units
    config.model.unroll = 3
    config.mesh.cpu_devices = 2
    config.data.batch_size = 128
    config.data.views = 4  # one text pass serves four drawings, and vendors can be blended
    config.data.augment.update(
        scale=0.15,
        stretch=0.15,
        shift=0.08,
        rotate=8.0,
        flip=0.3,
        brightness=0.2,
        contrast=0.4,
        saturation=0.3,
        hue=15.0,
        tint=0.1,
        mix=0.8,
    )
    config.optim.name = "muon"
    config.optim.learning_rate = 2e-3
    config.optim.warmup_steps = 50
    config.optim.weight_decay = 2.0  # strong, for a short run: over it, matrices shrink 7-fold
    config.train.steps = 820
    config.checkpoint.every = 300
    return config
