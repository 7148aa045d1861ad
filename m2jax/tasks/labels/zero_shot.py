# SPDX-License-Identifier: Apache-2.0
"""Class prompts: what a zero-shot score is a cosine to, and what a residual adapter starts from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float

from m2jax.eval import prompts as prompts_lib
from m2jax.eval.emoji import Encoder
from m2jax.tasks.labels import features
from m2jax.tasks.labels.vocabulary import Vocabulary

CHUNK = 512  # classes whose prompts are held at once


def class_prompts(
    model: Encoder,
    vocabulary: Vocabulary,
    languages: Sequence[str],
    *,
    templates: prompts_lib.Templates = prompts_lib.TEMPLATES,
    chunk: int = CHUNK,
) -> Float[np.ndarray, "classes dim"]:
    """Unit rows: of each label the mean over its names, the prompts, and the languages it has.

    Ten thousand labels with a dozen prompts in two languages are 240,000 texts: they are encoded a
    few labels at a time, and only the means are kept.
    """
    means = [
        _means(
            model,
            vocabulary.of(range(first, min(first + chunk, len(vocabulary)))),
            languages,
            templates,
        )
        for first in range(0, len(vocabulary), chunk)
    ]
    rows = np.concatenate(means)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def scores(
    images: Float[np.ndarray, "images dim"], prompts: Float[np.ndarray, "classes dim"]
) -> Float[np.ndarray, "images classes"]:
    """Cosines."""
    unit = images / np.maximum(np.linalg.norm(images, axis=1, keepdims=True), 1e-12)
    return unit @ prompts.T


def together(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Half of each after scaling all of it to [0, 1], as TaI-DPT's ensemble script does."""
    return (_min_max(first) + _min_max(second)) / 2


def _min_max(x: np.ndarray) -> np.ndarray:
    low, high = x.min(), x.max()
    return (x - low) / max(high - low, 1e-12)


def _means(
    model: Encoder,
    vocabulary: Vocabulary,
    languages: Sequence[str],
    templates: prompts_lib.Templates,
) -> np.ndarray:
    texts, ends = list[str](), [0]
    for names in vocabulary.names:
        texts += _prompts(names, languages, templates)
        ends.append(len(texts))
    found = features.texts(model, texts, length=False)
    sums = np.add.reduceat(found, ends[:-1], axis=0)
    return sums / np.diff(ends)[:, None]


def _prompts(
    names: dict[str, tuple[str, ...]] | object,
    languages: Sequence[str],
    templates: prompts_lib.Templates,
) -> Iterator[str]:
    assert isinstance(names, dict)
    for language in languages:
        for name in names.get(language, ()):
            yield from (t.replace("{c}", name) for t in templates[language])
