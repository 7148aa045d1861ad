# SPDX-License-Identifier: Apache-2.0
"""Caption metrics: CIDEr-D, BLEU-4 and ROUGE-L of written captions against several references.

The figures are those of the COCO caption evaluation, given the same words. English is split into
lower-case words without punctuation (COCO's own Java tokenizer splits clitics off, this one does
not). Chinese is split into characters, so that no segmenter has a say; runs of Latin letters or
digits inside it stay whole.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from m2jax.config import UserError
from m2jax.eval import metrics as metrics_lib
from m2jax.eval.metrics import Share

ORDERS = (1, 2, 3, 4)  # lengths of the n-grams
SIGMA = 6.0  # CIDEr-D: words of difference in length that a candidate gets away with
BETA = 1.2  # ROUGE-L: weight of recall against precision
TINY, SMALL = 1e-15, 1e-9  # BLEU: keep no match at 0, and no n-gram from dividing by 0

Words = Sequence[str]
Counts = Counter[tuple[str, ...]]

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_CHARACTER = re.compile(rf"[{_HAN}]|[^\W_{_HAN}]+")


class CaptionScores(NamedTuple):
    """Each with its bootstrap 95 % interval; CIDEr lies in [0, 10], the others in [0, 1]."""

    cider: Share
    bleu4: Share
    rouge_l: Share


def split(text: str, language: str) -> list[str]:
    """The words of a caption: characters where ``language`` is ``zh``."""
    return (_CHARACTER if language == "zh" else _WORD).findall(text.lower())


def score(
    candidates: Sequence[str], references: Sequence[Sequence[str]], *, language: str
) -> CaptionScores:
    """Scores one candidate per image against that image's references.

    Args:
        candidates: one caption per image; may be empty.
        references: of each image, at least one.
        language: decides what a word is; see ``split``.

    Raises:
        UserError: an image without a reference, or none at all.
    """
    if not candidates or len(candidates) != len(references) or not all(references):
        raise UserError(
            f"captions: {len(candidates)} candidates for {len(references)} images: give one for "
            "each, and every image at least one reference"
        )
    written = [split(text, language) for text in candidates]
    true = [[split(text, language) for text in texts] for texts in references]
    parts = bleu_parts(written, true)
    return CaptionScores(
        metrics_lib.bootstrap(cider(written, true)),
        metrics_lib.bootstrap(parts, lambda sums: bleu(sums)[..., -1]),
        metrics_lib.bootstrap(rouge_l(written, true)),
    )


def ngrams(words: Words) -> Counts:
    """How often each run of one to four words occurs."""
    return Counter(
        tuple(words[i : i + n]) for n in ORDERS for i in range(max(0, len(words) - n + 1))
    )


def cider(
    candidates: Sequence[Words], references: Sequence[Sequence[Words]]
) -> Float[np.ndarray, " images"]:
    """CIDEr-D of each image: Vedantam et al. 2015, "CIDEr", section 4 and equations 1, 2, 6, 7.

    Document frequencies are those of the references given, so a corpus of one image scores 0.
    """
    counts = [[ngrams(text) for text in texts] for texts in references]
    frequency = Counter(gram for texts in counts for gram in set().union(*texts))
    documents = math.log(len(references))

    def weighted(found: Counts) -> list[dict[tuple[str, ...], float]]:
        """Term frequency times inverse document frequency, by order."""
        by_order: list[dict[tuple[str, ...], float]] = [{} for _ in ORDERS]
        for gram, times in found.items():
            rarity = documents - math.log(max(1, frequency[gram]))
            by_order[len(gram) - 1][gram] = times * rarity
        return by_order

    scores = []
    for words, texts, of_texts in zip(candidates, references, counts, strict=True):
        own = weighted(ngrams(words))
        likeness = [
            sum(map(_clipped_cosine, own, weighted(found)))
            * math.exp(-((len(words) - len(text)) ** 2) / (2 * SIGMA**2))
            for text, found in zip(texts, of_texts, strict=True)
        ]
        scores.append(10 * sum(likeness) / len(likeness) / len(ORDERS))
    return np.array(scores)


def _clipped_cosine(a: dict[tuple[str, ...], float], b: dict[tuple[str, ...], float]) -> float:
    """Cosine of two vectors, where ``a`` gains nothing by more of a word than ``b`` has."""
    norms = math.sqrt(sum(x * x for x in a.values())) * math.sqrt(sum(x * x for x in b.values()))
    if not norms:
        return 0.0
    return sum(min(x, b[gram]) * b[gram] for gram, x in a.items() if gram in b) / norms


def bleu_parts(
    candidates: Sequence[Words], references: Sequence[Sequence[Words]]
) -> Float[np.ndarray, "images 10"]:
    """What BLEU sums over images: matched and all n-grams by order, own and closest length.

    Of two references as close in length the shorter counts.
    """
    rows = []
    for words, texts in zip(candidates, references, strict=True):
        most = Counter[tuple[str, ...]]()
        for text in texts:
            most |= ngrams(text)
        matched = ngrams(words) & most
        found = [sum(t for gram, t in matched.items() if len(gram) == n) for n in ORDERS]
        closest = min((abs(len(text) - len(words)), len(text)) for text in texts)[1]
        all_of = [max(0, len(words) - n + 1) for n in ORDERS]
        rows.append([*found, *all_of, len(words), closest])
    return np.array(rows, np.float64)


def bleu(sums: Float[np.ndarray, "*rows 10"]) -> Float[np.ndarray, "*rows 4"]:
    """BLEU-1 to BLEU-4 of a corpus from the sums of its ``bleu_parts`` (Papineni et al. 2002)."""
    matched, all_of, own, closest = np.split(sums, [4, 8, 9], axis=-1)
    precision = (matched + TINY) / (all_of + SMALL)
    mean = np.cumprod(precision, axis=-1) ** (1 / np.array(ORDERS))
    ratio = (own + TINY) / (closest + SMALL)
    return mean * np.exp(np.minimum(0, 1 - 1 / ratio))


def rouge_l(
    candidates: Sequence[Words], references: Sequence[Sequence[Words]]
) -> Float[np.ndarray, " images"]:
    """ROUGE-L of each image: Lin 2004, section 3.1.

    F measure of the longest common subsequence, from the best precision and the best recall over
    the references, as in the COCO evaluation.
    """
    scores = []
    for words, texts in zip(candidates, references, strict=True):
        common = [_longest_common(words, text) for text in texts]
        precision = max(common) / max(1, len(words))
        recall = max(c / max(1, len(text)) for c, text in zip(common, texts, strict=True))
        bottom = recall + BETA**2 * precision
        scores.append((1 + BETA**2) * precision * recall / bottom if bottom else 0.0)
    return np.array(scores)


def _longest_common(a: Words, b: Words) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]
