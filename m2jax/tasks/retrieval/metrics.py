# SPDX-License-Identifier: Apache-2.0
"""Metrics of instance retrieval: revisited Oxford and Paris, Google Landmarks v2.

Sources: Radenovic et al. 2018, "Revisiting Oxford and Paris", and its evaluation script; Weyand et
al. 2020, "Google Landmarks Dataset v2". Both mean average precisions have the name mAP and are not
the same: the first is trapezoidal over the whole ranking, the second a plain sum over k items.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from m2jax.config import UserError
from m2jax.tasks.ranking import Hits, Lists

KAPPAS = (1, 5, 10)
PROTOCOLS = ("easy", "medium", "hard")


class Truth(NamedTuple):
    """What a query's ground truth says of items, per query; the rest is wrong."""

    easy: Lists
    hard: Lists
    junk: Lists


class Revisited(NamedTuple):
    """Results of one protocol; queries without right items are NaN and left out of means."""

    mean_ap: float
    ap: Float[np.ndarray, " queries"]
    mean_precision: Float[np.ndarray, " kappas"]
    precision: Float[np.ndarray, "queries kappas"]


class MeanAP(NamedTuple):
    """A mean average precision and its parts."""

    mean_ap: float
    ap: Float[np.ndarray, " queries"]


def protocol(truth: Truth, name: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Right and ignored items of each query: easy | medium | hard.

    Easy: hard ones are ignored like junk; medium: easy and hard are right; hard: easy are ignored.

    Raises:
        UserError: an unknown name.
    """
    if name not in PROTOCOLS:
        raise UserError(f"protocol {name!r}: unknown: use one of {', '.join(PROTOCOLS)}")
    right, ignored = [], []
    for parts in zip(truth.easy, truth.hard, truth.junk, strict=True):
        easy, hard, junk = (np.asarray(part, np.int64) for part in parts)
        both = np.concatenate([easy, hard])
        right.append({"easy": easy, "medium": both, "hard": hard}[name])
        more = {"easy": hard, "medium": easy[:0], "hard": easy}[name]
        ignored.append(np.concatenate([junk, more]))
    return right, ignored


def revisited(
    truth: Truth,
    rank: Callable[[Lists, Lists], Hits],
    *,
    kappas: Sequence[int] = KAPPAS,
) -> dict[str, Revisited]:
    """The three protocols of revisited Oxford and Paris.

    Args:
        truth: of each query.
        rank: from right and ignored items to hits, as ``ranking.hits`` with its scores filled in.
        kappas: numbers of items for the precisions.
    """
    return {name: _revisited(rank(*protocol(truth, name)), kappas) for name in PROTOCOLS}


def _revisited(hits: Hits, kappas: Sequence[int]) -> Revisited:
    ap = np.full(len(hits.ranks), np.nan)
    precision = np.full((len(hits.ranks), len(kappas)), np.nan)
    for query, (ranks, total) in enumerate(zip(hits.ranks, hits.totals, strict=True)):
        if total:
            ap[query] = trapezoid(ranks, int(total))
            precision[query] = [precision_at(ranks, k) for k in kappas]
    return Revisited(_mean(ap), ap, np.array([_mean(p) for p in precision.T]), precision)


def _mean(values: Float[np.ndarray, " queries"]) -> float:
    """The mean over the queries that have right items; NaN where none has."""
    real = values[~np.isnan(values)]
    return float(real.mean()) if len(real) else float("nan")


def trapezoid(ranks: Int[np.ndarray, " found"], total: int) -> float:
    """Average precision with trapezoids, as the Oxford script has had it since 2007.

    sum_j ((j + 1) / (rank_j + 1) + p_j) / 2 / total, where p_j = j / rank_j, and 1 at rank 0.
    """
    j = np.arange(len(ranks))
    after = (j + 1) / (ranks + 1)
    before = np.where(ranks == 0, 1.0, j / np.maximum(ranks, 1))
    return float(((after + before) / 2).sum() / total)


def precision_at(ranks: Int[np.ndarray, " found"], k: int) -> float:
    """Precision among k items, or down to the last right one where that is before."""
    if not len(ranks):
        return 0.0
    reach = min(int(ranks.max()) + 1, k)
    return float((ranks < reach).sum() / reach)


def mean_ap_at(hits: Hits, k: int) -> MeanAP:
    """GLDv2's mAP@k: sum over hits among k of precision at the hit, over min(right items, k).

    A query without a hit counts as 0, one without right items too (the data set has none).

    Raises:
        UserError: k below 1.
    """
    if k < 1:
        raise UserError(f"mAP@{k}: k must be at least 1")
    ap = np.zeros(len(hits.ranks))
    for query, (ranks, total) in enumerate(zip(hits.ranks, hits.totals, strict=True)):
        near = ranks[ranks < k]
        ap[query] = ((np.arange(len(near)) + 1) / (near + 1)).sum() / max(min(total, k), 1)
    return MeanAP(float(ap.mean()) if len(ap) else float("nan"), ap)
