# SPDX-License-Identifier: Apache-2.0
"""A tiny experiment on batches made of numbers: what the trainer's tests run on."""

import dataclasses

import jax
import numpy as np
import sentencepiece  # noqa: F401  (its C++ types warn when first imported inside a test)

from m2jax import config
from m2jax.config_files import load_config
from m2jax.data import loader
from m2jax.data.image import Preprocess
from m2jax.data.text import SentencePieceTokenizer, train_tokenizer
from m2jax.dist.mesh import make_mesh
from m2jax.train import main


class ToySource:
    """Batches that depend on the index alone; some poisoned with NaN by request."""

    def __init__(self, experiment, assets=None):
        self.cfg = experiment
        words = [f"word{i}" for i in range(40)]
        tokenizer = self.tokenizer = SentencePieceTokenizer(train_tokenizer(words, 60), 6)
        self.assets = {
            "tokenizer": tokenizer.to_dict(),
            "preprocess": Preprocess(16, "white").to_dict(),
        }

    def batch(self, index, rows):
        rng = np.random.default_rng(index)
        n, data = self.cfg.data.batch_size, self.cfg.data
        shape = (n, len(data.languages), self.cfg.model.max_text_len)
        batch = {
            "image": rng.integers(0, 256, (n, data.views, 16, 16, 4), np.uint8),
            "text": rng.integers(4, 60, shape, np.int32),
            "text_mask": np.ones(shape, np.bool_),
            "concept": rng.permutation(n).astype(np.int32),
        }
        return {k: v[rows] for k, v in batch.items()}


def experiment(monkeypatch, *, augment=False, **train):
    """The tiny experiment, its source registered under the name ``toy``.

    With ``augment`` drawings are changed as in the demo: a quarter of a step's compiling.

    Whole runs take two of the eight virtual devices: with more devices than cores the collectives
    of a run can wait for each other's threads until XLA aborts the process. What needs eight makes
    its mesh itself.
    """
    monkeypatch.setitem(loader.SOURCES, "toy", ToySource)
    monkeypatch.setattr(main, "make_mesh", lambda spec: make_mesh(spec, jax.devices()[:2]))
    base = load_config("emoji")
    model = config.Model(
        width=16,
        heads=2,
        out_dim=8,
        vocab_size=100,
        text_positions=16,
        image_size=16,
        max_text_len=6,
        dtype="float32",
        init="scaled",
    )
    return dataclasses.replace(
        base,
        model=config.resolve(model),
        data=config.Data(
            name="toy",
            batch_size=16,
            augment=base.data.augment if augment else config.Augment(),
            views=2,
        ),
        mesh=config.Mesh(),
        # The length of a run is no constant of its program then: runs of any length share one.
        optim=config.Optim(warmup_steps=2, ema=0.9, schedule="constant"),
        train=config.Train(**{"steps": 8, "log_every": 1, **train}),
        checkpoint=config.Checkpoint(every=3, keep=3),
        eval=config.Eval(suite=""),
    )
