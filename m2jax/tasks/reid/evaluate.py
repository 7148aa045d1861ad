# SPDX-License-Identifier: Apache-2.0
"""mAP and CMC of a model on a re-identification set, plain and re-ranked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float
from PIL import Image

from m2jax.config import UserError
from m2jax.tasks.embedder import Embedder
from m2jax.tasks.ranking import FeatureScores, MatrixScores
from m2jax.tasks.reid import metrics
from m2jax.tasks.reid.readers import ReidSet, Split
from m2jax.tasks.reid.rerank import rerank as rerank_distances

RANKS = (1, 5, 10)
RERANKED = 2 * 10**9  # pairs; their distances are held at once, 8 GB


class Encoder(Protocol):
    """What ``m2jax.load`` gives, or an embedder; one of those may take cameras too."""

    def preprocess(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Pixels."""
        ...

    def encode_image(self, pixels: np.ndarray) -> Any:
        """Features [n, dim] of pixels."""
        ...


def evaluate(
    model: Encoder | Embedder,
    data: ReidSet,
    *,
    batch: int = 64,
    rerank: bool = False,
    cameras: bool = True,
    say: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, dict[str, float]]:
    """Figures by name: ``plain``, and ``reranked`` if asked for; shares between 0 and 1.

    Args:
        model: a bundle or an embedder.
        data: its query and gallery are embedded.
        batch: images at once.
        rerank: k-reciprocal re-ranking too.
        cameras: tell them to a model that takes them.
        say: hears how many images of all are done.

    Raises:
        UserError: a picture cannot be read, no query has a match, too many to re-rank, or a
            camera that the model does not know.
    """
    sides = data.query, data.gallery
    labels = data.query.labels, data.gallery.labels
    metrics.relevance(*labels)  # that nothing can be measured is said before hours of embedding
    most = max(int(each.cameras.max()) for each in labels) + 1
    if cameras and isinstance(model, Embedder) and 0 < model.cameras < most:
        raise UserError(
            f"--data: has {most} cameras, the model knows {model.cameras}: add --no-cameras to "
            "measure it without them"
        )
    pairs = len(data.query.images) * len(data.gallery.images)
    if rerank and pairs > RERANKED:
        raise UserError(f"--rerank: {pairs:,} pairs are more than {RERANKED:,}: leave it out")
    one = data.query is data.gallery  # of the emoji set
    total, done = sum(len(side.images) for side in (sides[:1] if one else sides)), 0
    features: list[np.ndarray] = []
    for side in sides:
        before = done

        def heard(n: int, before: int = before) -> None:
            say(before + n, total)

        again = one and features
        found = features[0] if again else embed(model, side, batch, heard, cameras=cameras)
        features.append(found)
        done += len(side.images)
    scores = FeatureScores(features[0], features[1])
    figures = {"plain": _figures(metrics.evaluate(scores, *labels))}
    if rerank:
        unit = [x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in features]
        distances = rerank_distances(unit[0], unit[1])
        figures["reranked"] = _figures(metrics.evaluate(MatrixScores(distances), *labels))
    return figures


def embed(
    model: Encoder | Embedder,
    side: Split,
    batch: int,
    say: Callable[[int], None],
    *,
    cameras: bool = True,
) -> Float[np.ndarray, "images dim"]:
    """Features of a split's pictures in batches of one shape, with cameras if they are taken."""
    count, found = len(side.images), []
    batch = min(batch, count)
    for first in range(0, count, batch):
        rows = np.minimum(np.arange(first, first + batch), count - 1)  # one shape to the end
        pixels = model.preprocess([side.images.read(int(row)) for row in rows])
        if cameras and isinstance(model, Embedder) and model.cameras:
            made = model.encode_image(pixels, side.labels.cameras[rows])
        else:
            made = model.encode_image(pixels)
        found.append(np.asarray(made, np.float32)[: count - first])
        say(min(first + batch, count))
    return np.concatenate(found)


def _figures(found: metrics.Reid) -> dict[str, float]:
    ranks = {f"r{r}": float(found.cmc[r - 1]) for r in RANKS if r <= len(found.cmc)}
    return {"map": found.mean_ap, **ranks, "queries": found.queries}
