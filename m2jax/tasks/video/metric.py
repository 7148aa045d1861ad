# SPDX-License-Identifier: Apache-2.0
"""VCSL's segment metric: precision and recall of copied segments, and their averages.

He et al., "A Large-scale Comprehensive Dataset and Copy-overlap Aware Evaluation Protocol for
Segment-level Video Copy Detection", CVPR 2022, as their published evaluation computes it, its
float32 unions included. All pairs are scored at once, in arrays; a test split takes a second.

Its habits are kept: a prediction given twice costs nothing, both axes must overlap, and a perfect
match scores just below 1 (``EPSILON``), by which the averages tell it from a pair that has nothing
to score.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Float64, Int64

from m2jax.config import UserError
from m2jax.tasks.video.segments import Boxes, Segments, gather

EPSILON = 1e-6  # of the denominators
CHUNK = 2**20  # prediction-label combinations held at once
PAIR_LIMIT = 2**24  # of one pair


class PairScores(NamedTuple):
    """Of each pair; (1, 1) where nothing is there to be found and nothing was."""

    precision: Float64[np.ndarray, " pairs"]
    recall: Float64[np.ndarray, " pairs"]


class Micro(NamedTuple):
    """VCSL's headline: plain means over the pairs that have something to score."""

    recall: float  # nan: no pair counts for it
    precision: float  # nan: no pair counts for it
    f1: float  # nan: there is nothing to be found and nothing was
    frr: float  # share of the copies without any prediction
    far: float  # share of the negative pairs with a prediction


class Macro(NamedTuple):
    """Means over query sets of the means over their pairs."""

    recall: float
    precision: float
    f1: float
    sets: int  # how many


def score(predictions: Sequence[Boxes], truth: Sequence[Boxes]) -> PairScores:
    """Scores pairs of videos.

    Args:
        predictions: of each pair its predicted segments.
        truth: of each pair its true segments.

    Raises:
        UserError: the lengths differ, or something is no segment.
    """
    if len(predictions) != len(truth):
        raise UserError(
            f"segments: {len(predictions)} pairs predicted, {len(truth)} labelled: pass one list "
            "per pair"
        )
    return score_segments(gather(predictions, "predictions"), gather(truth, "labels"))


def score_segments(predictions: Segments, truth: Segments) -> PairScores:
    """``score`` of segments that are arrays already.

    Raises:
        UserError: one pair has so many of both that they cannot be combined in memory.
    """
    n, m = predictions.counts, truth.counts
    if (n * m).max(initial=0) > PAIR_LIMIT:
        row = int(np.argmax(n * m))
        raise UserError(f"pair {row}: {n[row]:,} segments: give at most {PAIR_LIMIT // m[row]:,}")
    hits = np.zeros((2, 2, len(n)))  # by role (precision, recall), axis and pair
    for pairs in _chunks(n * m):
        hits[:, :, pairs] += _hits(predictions, truth, pairs)
    precision = np.prod(hits[0] / (_lengths(predictions) + EPSILON), axis=0)
    recall = np.prod(hits[1] / (_lengths(truth) + EPSILON), axis=0)
    return PairScores(
        np.where(n == 0, 1.0, np.where(m == 0, 0.0, precision)),
        np.where(m == 0, 1.0, np.where(n == 0, 0.0, recall)),
    )


def _chunks(sizes: Int64[np.ndarray, " pairs"]) -> Iterator[slice]:
    """Runs of pairs whose combinations fit ``CHUNK``; at least one pair each."""
    ends = np.cumsum(sizes)
    first = 0
    while first < len(sizes):
        done = ends[first - 1] if first else 0
        last = max(int(np.searchsorted(ends, done + CHUNK, side="right")), first + 1)
        yield slice(first, last)
        first = last


def _hits(predictions: Segments, truth: Segments, pairs: slice) -> Float64[np.ndarray, "2 2 pairs"]:
    """Matched length by role, axis and pair: sums of unions over one side's segments."""
    n, m = predictions.counts[pairs], truth.counts[pairs]
    owner = np.repeat(np.arange(len(n)), n * m)  # of each combination
    within = np.arange(len(owner)) - np.repeat(np.cumsum(n * m) - n * m, n * m)
    i = (np.cumsum(n) - n)[owner] + within // m[owner] + predictions.counts[: pairs.start].sum()
    j = (np.cumsum(m) - m)[owner] + within % m[owner] + truth.counts[: pairs.start].sum()
    low = np.maximum(predictions.boxes[i, :2], truth.boxes[j, :2])
    high = np.minimum(predictions.boxes[i, 2:], truth.boxes[j, 2:])
    kept = (high > low).all(axis=1)  # of area above zero: touching is no match
    found = np.zeros((2, 2, len(n)))
    for role, segment in enumerate((i, j)):
        of, group = np.unique(segment[kept], return_inverse=True)
        home = np.zeros(len(of), np.int64)
        home[group] = owner[kept]
        for axis in range(2):
            unions = union_lengths(low[kept, axis], high[kept, axis], group, len(of))
            found[role, axis] = np.bincount(home, unions, minlength=len(n))
    return found


def union_lengths(
    starts: Float[np.ndarray, " segments"],
    ends: Float[np.ndarray, " segments"],
    group: Int64[np.ndarray, " segments"],
    groups: int,
) -> Float32[np.ndarray, " groups"]:
    """Length of the union of the 1-D segments of each group.

    Merged segments are rounded to float32 and their lengths added in float32, as the published
    code does: exact for whole numbers below 2^24.

    Args:
        starts: where each begins.
        ends: where each ends.
        group: the group of each; every group has at least one.
        groups: how many groups.
    """
    if not groups:
        return np.zeros(0, np.float32)
    order = np.lexsort((starts, group))
    starts, ends, group = starts[order], ends[order], group[order]
    # The furthest end so far within the group. Ranks instead of values, so that one running
    # maximum serves all groups.
    values, rank = np.unique(ends, return_inverse=True)
    furthest = values[np.maximum.accumulate(group * len(values) + rank) % len(values)]
    fresh = np.ones(len(starts), bool)  # begins a merged segment; touching ones merge
    fresh[1:] = (furthest[:-1] < starts[1:]) | (group[1:] != group[:-1])
    last = np.append(np.flatnonzero(fresh)[1:], len(starts)) - 1
    lengths = furthest[last].astype(np.float32) - starts[fresh].astype(np.float32)
    first = np.searchsorted(group[fresh], np.arange(groups))
    return np.add.reduceat(lengths, first)


def _lengths(segments: Segments) -> Float64[np.ndarray, "2 pairs"]:
    """Summed, not united, lengths per axis and pair."""
    lengths = segments.boxes[:, 2:] - segments.boxes[:, :2]
    owners, pairs = segments.owners, len(segments.counts)
    return np.stack([np.bincount(owners, lengths[:, a], minlength=pairs) for a in range(2)])


def micro(scores: PairScores, ratio: float = 1.0) -> Micro:
    """The headline figures ("overall"): means over pairs whose value is not exactly 1.

    A missed copy counts 0 in recall and not at all in precision, a false alarm on a negative pair
    0 in precision and not at all in recall. Where no pair is left the published code divides by
    zero; here that mean is nan, and F is 0 if the other mean is 0.

    Args:
        scores: of the pairs.
        ratio: positive pairs per negative pair; 1 in VCSL's splits.
    """
    precision, recall = scores
    pairs = len(precision)
    # Not np.mean: the published code adds one after the other.
    r, p = (_mean(values[values != 1]) for values in (recall, precision))
    missed = int(((precision == 1) & (recall == 0)).sum())
    alarms = int(((precision == 0) & (recall == 1)).sum())
    frr = (1 + ratio) / ratio * missed / pairs if pairs and ratio else math.nan
    far = (1 + ratio) * alarms / pairs if pairs and math.isfinite(ratio) else math.nan
    if pairs and math.isinf(ratio):
        frr = missed / pairs
    return Micro(r, p, _f1(r, p), frr, far)


def macro(
    scores: PairScores, keys: Sequence[str], query_sets: Mapping[str, Sequence[str]]
) -> Macro:
    """Means over query sets; every pair counts, the values 0 and 1 included.

    Args:
        scores: of the pairs.
        keys: name of each pair.
        query_sets: names of the pairs of each set.

    Raises:
        UserError: a set names a pair that was not scored, or is empty.
    """
    row = {key: number for number, key in enumerate(keys)}
    found = []
    for name, members in query_sets.items():
        lost = next((key for key in members if key not in row), None)
        if lost is not None or not members:
            raise UserError(
                f"query set {name:.80}: pair {lost or '(none)'} was not scored: "
                "score the split that it is of"
            )
        rows = [row[key] for key in members]
        found.append((_mean(scores.recall[rows]), _mean(scores.precision[rows])))
    recall, precision = (_mean(np.array([pair[i] for pair in found])) for i in range(2))
    return Macro(recall, precision, _f1(recall, precision), len(found))


def _mean(values: Float64[np.ndarray, " n"]) -> float:
    return math.fsum(values) / len(values) if len(values) else math.nan


def _f1(recall: float, precision: float) -> float:
    if recall == 0 or precision == 0:
        return 0.0
    return 2 * recall * precision / (recall + precision)
