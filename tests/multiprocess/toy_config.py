# SPDX-License-Identifier: Apache-2.0
"""The tiny run of the fault tests: a save every four steps, every step logged."""

from ml_collections import ConfigDict

from m2jax.config import as_config_dict


def get_config() -> ConfigDict:
    """A model of a few thousand parameters on rows made of their own numbers (``worker.py``)."""
    config = as_config_dict()
    config.model.update(
        width=16,
        heads=2,
        backbone_layers=1,
        vl_layers=1,
        out_dim=8,
        vocab_size=100,
        text_positions=16,
        image_size=16,
        max_text_len=6,
        dtype="float32",
        init="scaled",
    )
    config.data.name = "rows"
    config.data.batch_size = 16
    config.optim.warmup_steps = 2
    config.optim.ema = 0.9
    config.train.steps = 24
    config.train.log_every = 1
    config.checkpoint.every = 4
    config.checkpoint.keep = 3
    config.eval.suite = ""
    return config
