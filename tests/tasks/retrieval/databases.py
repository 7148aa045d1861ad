# SPDX-License-Identifier: Apache-2.0
"""Features of an old and a new model that can be compared, and databases to hold them."""

import numpy as np

from m2jax.tasks.retrieval.backfill import Features


def models(n=60, dim=16, seed=0, noise=(0.6, 0.2)):
    """An old and a new model's vectors of the same items: one space, less noise in the new."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=(n, dim))
    ids = [f"item {i}" for i in range(n)]
    return [
        Features(ids, (truth + level * rng.normal(size=(n, dim))).astype(np.float32))
        for level in noise
    ]


def write_npz(file, features):
    np.savez(file, features=features.vectors, ids=np.array(features.ids))
    return file
