# SPDX-License-Identifier: Apache-2.0
"""mAP and CMC of a model on a re-identification set, plain and re-ranked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import Float
from PIL import Image

from m2jax.config import UserError
from m2jax.data.image import open_image
from m2jax.tasks.ranking import FeatureScores, MatrixScores
from m2jax.tasks.reid import metrics
from m2jax.tasks.reid.readers import ReidSet
from m2jax.tasks.reid.rerank import rerank as rerank_distances

RANKS = (1, 5, 10)
RERANKED = 2 * 10**9  # pairs; their distances are held at once, 8 GB


class Encoder(Protocol):
    """What ``m2jax.load`` gives."""

    def preprocess(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Pixels."""
        ...

    def encode_image(self, pixels: np.ndarray) -> object:
        """Features [n, dim] of pixels."""
        ...


def evaluate(
    model: Encoder,
    data: ReidSet,
    *,
    batch: int = 64,
    rerank: bool = False,
    say: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, dict[str, float]]:
    """Figures by name: ``plain``, and ``reranked`` if asked for; shares between 0 and 1.

    Args:
        model: a bundle.
        data: its query and gallery are embedded.
        batch: images at once.
        rerank: k-reciprocal re-ranking too.
        say: hears how many images of all are done.

    Raises:
        UserError: a picture cannot be read, no query has a match, or too many to re-rank.
    """
    sides = data.query, data.gallery
    pairs = len(data.query.files) * len(data.gallery.files)
    if rerank and pairs > RERANKED:
        raise UserError(f"--rerank: {pairs:,} pairs are more than {RERANKED:,}: leave it out")
    total, done = sum(len(side.files) for side in sides), 0
    features = []
    for side in sides:
        before = done
        features.append(
            embed(model, side.files, batch, lambda n, before=before: say(before + n, total))
        )
        done += len(side.files)
    labels = data.query.labels, data.gallery.labels
    found = {"plain": _figures(metrics.evaluate(FeatureScores(*features), *labels))}
    if rerank:
        unit = [x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in features]
        distances = rerank_distances(unit[0], unit[1])
        found["reranked"] = _figures(metrics.evaluate(MatrixScores(distances), *labels))
    return found


def embed(
    model: Encoder, pictures: Sequence[Path], batch: int, say: Callable[[int], None]
) -> Float[np.ndarray, "images dim"]:
    """Features of pictures, in batches of one shape."""
    found, batch = [], min(batch, len(pictures))
    for first in range(0, len(pictures), batch):
        part = list(pictures[first : first + batch])
        full = part + part[-1:] * (batch - len(part))
        pixels = model.preprocess([open_image(path) for path in full])
        found.append(np.asarray(model.encode_image(pixels), np.float32)[: len(part)])
        say(first + len(part))
    return np.concatenate(found)


def _figures(found: metrics.Reid) -> dict[str, float]:
    ranks = {f"r{r}": float(found.cmc[r - 1]) for r in RANKS if r <= len(found.cmc)}
    return {"map": found.mean_ap, **ranks, "queries": found.queries}
