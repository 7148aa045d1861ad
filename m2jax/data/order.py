# SPDX-License-Identifier: Apache-2.0
"""Which row of which source stands at which place of the endless training order.

The order is a function of the place alone: no state, so any process can work out any row, and a
run that goes on with other processes or workers sees what it would have seen.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from grain.experimental import index_shuffle
from jaxtyping import Int

from m2jax.config import UserError

PERIOD = 1000  # places after which the sequence of sources repeats
KEPT = 2  # permutations in memory per source: 8 bytes a row each
LARGE = 2**27  # rows from which on each place is worked out by itself: 0.01 ms, no permutation
ROUNDS = 4  # of the cipher that does it, as in Grain's own shuffle

_making = threading.Lock()  # threads that prepare batches would each make the same permutation


class Places(NamedTuple):
    """What stands at each of n places."""

    part: Int[np.ndarray, " n"]  # index of the source
    row: Int[np.ndarray, " n"]  # of the source


class Order:
    """Sources interleaved by weight, each in epochs that are random permutations.

    Of the ``PERIOD`` places from any multiple of it on, each source fills its share, rounded to
    whole places; in between, the source furthest behind its share comes next.

    Args:
        sizes: rows of each source.
        weights: in proportion to these their rows come.
        seed: of the permutations.

    Raises:
        UserError: a weight that is not positive, or too small to fill one place of ``PERIOD``.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        self._sizes, self._seed = tuple(sizes), seed
        self.counts = _shares(weights)
        self._pattern = _interleave(self.counts)
        ranks = np.zeros(PERIOD, np.int64)
        for part, count in enumerate(self.counts):
            ranks[self._pattern == part] = np.arange(count)
        self._rank = ranks
        self._kept: list[dict[int, np.ndarray]] = [{} for _ in sizes]

    def at(self, places: Int[np.ndarray, " n"]) -> Places:
        """The rows at these places."""
        period, offset = np.divmod(np.asarray(places, np.int64), PERIOD)
        part = self._pattern[offset]
        nth = period * np.asarray(self.counts)[part] + self._rank[offset]
        epoch, place = np.divmod(nth, np.asarray(self._sizes)[part])
        rows = np.empty_like(place)
        for one in {(int(p), int(e)) for p, e in zip(part, epoch, strict=True)}:
            here = (part == one[0]) & (epoch == one[1])
            rows[here] = self._rows(*one, place[here])
        return Places(part, rows)

    def _rows(self, part: int, epoch: int, places: np.ndarray) -> np.ndarray:
        """The rows at places of one epoch of a source."""
        size = self._sizes[part]
        if size < LARGE:
            return self._permutation(part, epoch)[places]
        (seed,) = np.random.SeedSequence((self._seed, part, epoch)).generate_state(1).tolist()
        return np.array([index_shuffle(int(i), size - 1, seed, ROUNDS) for i in places], np.int64)

    def _permutation(self, part: int, epoch: int) -> np.ndarray:
        """The order of a source in one epoch. The last ones made are kept."""
        order = self._kept[part].get(epoch)
        if order is None:
            with _making:
                kept = self._kept[part]
                order = kept.get(epoch)
                if order is None:
                    rng = np.random.default_rng((self._seed, part, epoch))
                    order = rng.permutation(self._sizes[part])
                    # A new dict, so that threads that look at the old one find it whole.
                    self._kept[part] = dict([*kept.items(), (epoch, order)][-KEPT:])
        return order


def _shares(weights: Sequence[float]) -> tuple[int, ...]:
    """Places of ``PERIOD`` for each weight: the largest remainders get what rounding left over."""
    if not weights or any(not np.isfinite(w) or w <= 0 for w in weights):
        raise UserError(f"data.mixture: weights {list(weights)}: each must be above 0: mend them")
    exact = np.asarray(weights, np.float64) / sum(weights) * PERIOD
    counts = np.floor(exact).astype(int)
    short = PERIOD - counts.sum()
    counts[np.argsort(counts - exact, kind="stable")[:short]] += 1
    if counts.min() < 1:
        raise UserError(
            f"data.mixture: weight {weights[int(counts.argmin())]:g} is under one in {PERIOD}: "
            "raise it or leave the source out"
        )
    return tuple(int(c) for c in counts)


def _interleave(counts: Sequence[int]) -> np.ndarray:
    """``PERIOD`` source indices, as even as can be: always the one furthest behind its share."""
    share = np.asarray(counts) / PERIOD
    given, pattern = np.zeros(len(counts)), np.empty(PERIOD, np.int64)
    for place in range(PERIOD):
        behind = share * (place + 1) - given
        pattern[place] = int(np.argmax(behind))
        given[pattern[place]] += 1
    return pattern
