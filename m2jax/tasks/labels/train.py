# SPDX-License-Identifier: Apache-2.0
"""From labels to a trained adapter: sentences, features, training, thresholds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from m2jax.bundle import Bundle
from m2jax.config import UserError
from m2jax.eval import multilabel
from m2jax.eval.emoji import Encoder
from m2jax.tasks.labels import adapter, features, thresholds, vocabulary, zero_shot
from m2jax.tasks.labels.adapter import Settings
from m2jax.tasks.labels.corpus import Corpus, uncut
from m2jax.tasks.labels.grammar import Sentence
from m2jax.tasks.labels.saved import Saved
from m2jax.tasks.labels.vocabulary import Vocabulary

HELD_OUT = 0.1  # of the sentences, for thresholds and the figures of the report
MOST_HELD = 2_000
ROWS = 1_024  # items scored at once


@dataclass(frozen=True)
class Texts:
    """Sentences with their features; several adapters can be trained on one."""

    sentences: Sequence[Sentence]
    features: Float[np.ndarray, "sentences dim"]
    labels: Sequence[tuple[int, ...]]


def encoded(model: Encoder, corpus: Corpus, settings: Settings) -> Texts:
    """The sentences' features, as the settings normalise them."""
    length = settings.normalize == "none"
    rows = features.texts(model, [s.text for s in corpus.sentences], length=length)
    return Texts(corpus.sentences, rows, [s.labels for s in corpus.sentences])


def languages_of(words: Vocabulary, wanted: Sequence[str] = ()) -> tuple[str, ...]:
    """The languages to train in: those asked for, else all that every label has a name in.

    Raises:
        UserError: a label has no name in one that was asked for, or they share none.
    """
    for language in wanted:
        if language not in vocabulary.LANGUAGES:
            raise UserError(f"--languages {language}: use {' or '.join(vocabulary.LANGUAGES)}")
        for number, names in enumerate(words.names):
            if language not in names:
                raise UserError(
                    f"--languages {language}: {words.title(number)!r} has no name in it: add one"
                )
    found = tuple(wanted) or words.languages
    if not found:
        raise UserError("--labels: names in two languages and none common: name all in one of them")
    return found


def fit(
    model: Bundle, words: Vocabulary, corpus: Corpus, languages: Sequence[str], settings: Settings
) -> Saved:
    """Trains on the sentences but a tenth, which thresholds and the report's figures come from.

    Sentences that the model would read in part are left out (``corpus.uncut``).
    """
    vocabulary.check_length(model, words)
    begin = time.monotonic()
    corpus = uncut(model, words, corpus)
    texts = encoded(model, corpus, settings)
    prompts = zero_shot.class_prompts(model, words, languages)
    encoding = time.monotonic() - begin
    return fitted(
        texts,
        words,
        prompts,
        settings,
        corpus.report | {"encoding_s": encoding},
        languages=languages,
        model=features.fingerprint(model),
    )


def fitted(
    texts: Texts,
    words: Vocabulary,
    prompts: Float[np.ndarray, "classes dim"],
    settings: Settings,
    report: dict[str, Any],
    *,
    languages: Sequence[str],
    model: str,
) -> Saved:
    """The part of ``fit`` after the encoder."""
    kept, held = _split(len(texts.labels), settings.seed)
    begin = time.monotonic()
    trained = adapter.train(
        texts.features[kept], [texts.labels[i] for i in kept], len(words), settings, prompts
    )
    took = time.monotonic() - begin
    shown = shown_matrix([texts.labels[i] for i in held], len(words))
    clean = texts.features[held]
    length = float(np.linalg.norm(texts.features, axis=1).mean())
    moved = np.asarray(
        adapter.perturbed(jnp.asarray(clean), jax.random.key(settings.seed + 1), settings, length)
    )
    rows = scored(trained.params, moved, settings, prompts)
    limits = thresholds.best(rows, shown)
    exact = multilabel.f1(thresholds.crossed(rows, shown), shown)
    report = report | {
        "train_s": took,
        "first_loss": float(trained.losses[0]),
        "last_loss": float(trained.losses[-1]),
        "held_out_sentences": len(held),
        "text_map": multilabel.mean_ap(rows[:, shown.any(0)], shown[:, shown.any(0)]).map,
        "text_of1": exact.of1,
        "own_thresholds": int((shown.sum(axis=0) >= thresholds.FEWEST).sum()),
    }
    return Saved(words, tuple(languages), settings, trained.params, prompts, limits, model, report)


def scored(
    params: adapter.Params,
    rows: Float[np.ndarray, "items dim"],
    settings: Settings,
    prompts: Float[np.ndarray, "classes dim"],
) -> Float[np.ndarray, "items classes"]:
    """Scores of any number of items, some at a time: the hidden layer is not held for all."""
    known = jnp.asarray(prompts)
    parts = [
        np.asarray(adapter.scores(params, jnp.asarray(rows[i : i + ROWS]), settings, known))
        for i in range(0, len(rows), ROWS)
    ]
    return np.concatenate(parts)


def shown_matrix(
    labels: Sequence[Sequence[int]], classes: int
) -> Bool[np.ndarray, "items classes"]:
    """True at the labels of each item."""
    found = np.zeros((len(labels), classes), np.bool_)
    for row, each in enumerate(labels):
        found[row, list(each)] = True
    return found


def _split(count: int, seed: int) -> tuple[Int[np.ndarray, " kept"], Int[np.ndarray, " held"]]:
    """Training and held-out rows."""
    order = np.random.default_rng((seed, 1)).permutation(count)
    held = min(max(int(HELD_OUT * count), 1), MOST_HELD)
    if count < 2:
        raise UserError(f"labels train: {count} sentences: ask for more with --sentences")
    return order[held:], order[:held]
