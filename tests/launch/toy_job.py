# SPDX-License-Identifier: Apache-2.0
"""A run of seconds for real schedulers: a tiny model on batches that their index alone decides.

``TOY_SECONDS`` makes every batch take that long, so that there is a middle to interrupt.
"""

import os
import time

import numpy as np
from ml_collections import ConfigDict

from m2jax.config import as_config_dict
from m2jax.data import loader
from m2jax.data.image import Preprocess
from m2jax.data.text import SentencePieceTokenizer, train_tokenizer


class Rows:
    """Noise, the same for the same index in every process and every attempt."""

    def __init__(self, experiment, assets=None):
        self.cfg = experiment
        tokenizer = SentencePieceTokenizer(train_tokenizer([f"word{i}" for i in range(40)], 60), 6)
        self.assets = {
            "tokenizer": tokenizer.to_dict(),
            "preprocess": Preprocess(16, "white").to_dict(),
        }

    def batch(self, index, rows):
        """Rows of batch ``index``."""
        time.sleep(float(os.environ.get("TOY_SECONDS", "0")))
        rng = np.random.default_rng(index)
        n, model = self.cfg.data.batch_size, self.cfg.model
        shape = (n, len(self.cfg.data.languages), model.max_text_len)
        batch = {
            "image": rng.integers(0, 256, (n, self.cfg.data.views, 16, 16, 4), np.uint8),
            "text": rng.integers(4, 60, shape, np.int32),
            "text_mask": np.ones(shape, np.bool_),
            "concept": rng.permutation(n).astype(np.int32),
        }
        return {name: values[rows] for name, values in batch.items()}


def get_config() -> ConfigDict:
    """Twenty steps, all logged, saved every seven."""
    loader.SOURCES["toy-rows"] = Rows
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
    config.data.name = "toy-rows"
    config.data.batch_size = 16
    config.optim.warmup_steps = 2
    config.train.steps = 20
    config.train.log_every = 1
    config.checkpoint.every = 7
    config.eval.suite = ""
    return config
