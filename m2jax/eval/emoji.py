# SPDX-License-Identifier: Apache-2.0
"""The emoji suite: drawings in styles the model never saw, named in English and in Chinese.

Zero-shot ranks the names of every concept the style draws, seen and unseen together; the bare name
is the prompt. Retrieval ranks drawings and names of one part (seen or unseen) against each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Float
from PIL import Image

from m2jax.data.emoji import Drawings, EmojiData
from m2jax.eval import baselines, figures
from m2jax.eval import metrics as metrics_lib
from m2jax.eval.figures import Figure

KS = (1, 5, 10)


@runtime_checkable
class Encoder(Protocol):
    """What is scored: a ``Bundle``, or anything with its methods."""

    def encode_image(self, pixels: np.ndarray) -> jax.Array:
        """[b, h, w, 3] in [0, 1] -> unit rows."""
        ...

    def encode_text(self, ids: np.ndarray, mask: np.ndarray) -> jax.Array:
        """[b, length] -> unit rows."""
        ...

    def tokenize(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Texts -> ids, mask."""
        ...

    def preprocess(self, images: Sequence[Image.Image]) -> np.ndarray:
        """PIL images -> pixels."""
        ...


class Scored(NamedTuple):
    """One style in one language, kept for the report."""

    style: str
    language: str
    drawings: Drawings
    candidates: np.ndarray  # concept ids, the columns of ``scores``
    scores: Float[np.ndarray, "drawings candidates"]
    right: np.ndarray  # bool, as ``scores``
    seen: np.ndarray  # bool per drawing


def image_features(model: Encoder, drawings: Drawings, batch: int) -> np.ndarray:
    """Features of drawings, through the model's own preprocessing."""
    pixels = model.preprocess([Image.fromarray(image) for image in drawings.images])
    return batched(lambda start, stop: model.encode_image(pixels[start:stop]), len(pixels), batch)


def text_features(model: Encoder, texts: Sequence[str], batch: int) -> np.ndarray:
    """Features of texts."""
    ids, mask = model.tokenize(texts)
    return batched(
        lambda start, stop: model.encode_text(ids[start:stop], mask[start:stop]), len(texts), batch
    )


def batched(encode: Callable[[int, int], jax.Array], total: int, batch: int) -> np.ndarray:
    """Runs equal batches; the last one overlaps the one before, so one shape is compiled."""
    batch = min(batch, total)
    parts: list[np.ndarray] = []
    for start in range(0, total, batch):
        first = min(start, total - batch)
        parts.append(np.asarray(encode(first, first + batch))[start - first :])
    return np.concatenate(parts)


def score_style(
    model: Encoder,
    data: EmojiData,
    drawings: Drawings,
    candidates: np.ndarray,
    *,
    name: str,
    languages: Sequence[str],
    batch: int,
) -> list[Scored]:
    """Scores every drawing against the name of every candidate, in each language."""
    images = image_features(model, drawings, batch)
    right = metrics_lib.answer_matrix(data.answers(drawings), candidates)
    seen = data.is_seen(drawings)
    scored = []
    for language in languages:
        texts = text_features(model, [data.concepts[i].names[language] for i in candidates], batch)
        scored.append(Scored(name, language, drawings, candidates, images @ texts.T, right, seen))
    return scored


def summarise(scored: Scored) -> dict[str, Figure]:
    """The figures of one style and language, seen and unseen apart."""
    found: dict[str, Figure] = {}
    ranks = metrics_lib.first_right(scored.scores, scored.right)
    for part, rows in (("seen", scored.seen), ("unseen", ~scored.seen)):
        if not rows.any():
            continue
        where = f"{scored.style}/{part}/{scored.language}"
        for k in (1, 5):
            found[f"zero_shot/{where}/top{k}"] = figures.share(ranks[rows] < k)
        columns = scored.right[rows].any(axis=0)
        scores, right = (x[rows][:, columns] for x in (scored.scores, scored.right))
        ranked = []
        for way, matrix, gold in (("i2t", scores, right), ("t2i", scores.T, right.T)):
            ranked.append(metrics_lib.first_right(matrix, gold))
            for k in KS:
                found[f"retrieval/{where}/{way}_r{k}"] = figures.share(ranked[-1] < k)
        mean = metrics_lib.mean_recall(ranked, KS)
        if mean.value in (0, 1):  # the bootstrap's ends are no interval there
            mean = figures.at_an_end(mean.value, min(map(len, ranked)))
        found[f"retrieval/{where}/mean_recall"] = Figure(mean)
        sizes = scores.shape[1], scores.shape[0]  # what image->text and text->image rank
        by_chance = np.mean([baselines.chance(size, k) for size in sizes for k in KS])
        found[f"baseline/chance/{scored.style}/{part}/mean_recall"] = figures.exactly(
            float(by_chance)
        )
    return found
