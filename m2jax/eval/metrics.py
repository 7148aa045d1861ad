# SPDX-License-Identifier: Apache-2.0
"""Ranking metrics on plain arrays, with their confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from m2jax.config import UserError

Z95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution
BLOCK = 2**23  # counts of drawn examples held at once: 64 MB


class Share(NamedTuple):
    """A share of successes with its Wilson 95 % interval, or a mean with its bootstrap one."""

    value: float
    low: float
    high: float


def wilson(successes: int, total: int) -> Share:
    """The Wilson score interval (Wilson 1927); (0, 0, 1) for no trials."""
    if not total:
        return Share(0.0, 0.0, 1.0)
    p, z2 = successes / total, Z95**2
    centre = (p + z2 / (2 * total)) / (1 + z2 / total)
    half = Z95 / (1 + z2 / total) * math.sqrt(p * (1 - p) / total + z2 / (4 * total**2))
    return Share(p, max(0.0, centre - half), min(1.0, centre + half))


def first_right(
    scores: Float[np.ndarray, "queries items"], right: Bool[np.ndarray, "queries items"]
) -> Int[np.ndarray, " queries"]:
    """Rank (from 0) of the best right item of each query; ``items`` where none is right.

    Ties count against the query: a wrong item with the same score stands before the right one, so
    a constant score earns nothing.

    Raises:
        UserError: a score is not a number.
    """
    if np.isnan(scores).any():
        raise UserError("evaluation: a score is NaN: the model's features are broken")
    best = np.where(right, scores, -np.inf).max(axis=1, initial=-np.inf)
    before = ((scores >= best[:, None]) & ~right).sum(axis=1)
    return np.where(right.any(axis=1), before, scores.shape[1])


def resampled(
    totals: Sequence[int], statistic: Callable[..., np.ndarray], *, resamples: int = 1000
) -> Float[np.ndarray, " resamples"]:
    """A statistic of samples drawn anew with replacement, each on its own (Efron 1979).

    The draws are fixed, so one sample always gives one result, and two models that answered the
    same questions are drawn alike: their differences are paired.

    Args:
        totals: number of examples of each sample.
        statistic: from how often each example was drawn, float64 [block, total] per sample, to the
            statistic of each draw [block].
        resamples: number of draws.
    """
    rngs = [np.random.default_rng(number) for number in range(len(totals))]
    block = max(1, min(resamples, BLOCK // max(totals)))
    found = []
    for first in range(0, resamples, block):
        size = min(block, resamples - first)
        times = [
            rng.multinomial(total, np.full(total, 1 / total), size=size).astype(np.float64)
            for rng, total in zip(rngs, totals, strict=True)
        ]
        found.append(statistic(*times))
    return np.concatenate(found)


def interval(value: float, drawn: Float[np.ndarray, " resamples"]) -> Share:
    """A value with the percentile interval of its draws, widened where it lies outside of them."""
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return Share(float(value), float(min(low, value)), float(max(high, value)))


def bootstrap(
    parts: Float[np.ndarray, "samples ..."],
    statistic: Callable[[np.ndarray], np.ndarray] | None = None,
    *,
    resamples: int = 1000,
) -> Share:
    """A statistic of sums over a sample, with its bootstrap 95 % interval; see ``resampled``.

    Args:
        parts: of each sample, what the statistic needs sums of.
        statistic: from the sums [..., parts] over the sample; the mean if not given.
        resamples: number of samples drawn anew.
    """
    total = len(parts)
    of = statistic or (lambda sums: sums / total)
    drawn = resampled([total], lambda times: of(times @ parts), resamples=resamples)
    return interval(float(of(parts.sum(axis=0))), drawn)


def mean_recall(
    ranks: Sequence[Int[np.ndarray, " queries"]], ks: Sequence[int], *, resamples: int = 1000
) -> Share:
    """Mean over directions and k of the recall at k, with its bootstrap 95 % interval.

    Each direction's queries are drawn on their own: right where no query of one direction belongs
    to one of the other. ``retrieval.score`` draws images with their captions.
    """
    found = [np.stack([way < k for k in ks]).mean(axis=0) for way in ranks]  # each in [0, 1]

    def mean(*times: np.ndarray) -> np.ndarray:
        each = [t @ way / len(way) for t, way in zip(times, found, strict=True)]
        return np.mean(each, axis=0)

    drawn = resampled([len(way) for way in found], mean, resamples=resamples)
    return interval(float(np.mean([way.mean() for way in found])), drawn)


def hits(ranks: Int[np.ndarray, " queries"], k: int) -> Share:
    """Share of queries with a right item among the first k."""
    return wilson(int((ranks < k).sum()), len(ranks))


def answer_matrix(
    answers: Sequence[frozenset[int]], candidates: Int[np.ndarray, " items"]
) -> Bool[np.ndarray, "queries items"]:
    """Which candidate ids count as right for each query."""
    right = np.zeros((len(answers), len(candidates)), np.bool_)
    for row, ids in enumerate(answers):
        right[row] = np.isin(candidates, list(ids))
    return right
