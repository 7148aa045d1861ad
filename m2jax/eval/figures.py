# SPDX-License-Identifier: Apache-2.0
"""A measured number with its interval, and the examples that it was measured on.

The examples make two evaluations comparable question by question (``m2jax compare``): what differs
between the questions then cancels, and much smaller differences between models can be told.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from m2jax.eval import metrics as metrics_lib
from m2jax.eval.metrics import Share


class Figure(NamedTuple):
    """One number of a report."""

    share: Share
    # Of each example and ratio a numerator and a denominator: the figure is the mean over ratios of
    # sum of numerators / sum of denominators. None: it cannot be written so.
    examples: Float[np.ndarray, "examples ratios 2"] | None = None
    exact: bool = False  # no chance in it: no interval is written


def ratios(examples: Float[np.ndarray, "examples ratios 2"]) -> Figure:
    """The mean over ratios, with its bootstrap interval over the examples.

    Ratios that are all 0 or 1 take the ends of Wilson's intervals: every resample is as they are.
    """
    count = examples.shape[1]
    parts = examples.reshape(len(examples), -1).astype(np.float64)

    def mean(sums: np.ndarray) -> np.ndarray:
        return ratio_mean(sums.reshape(*sums.shape[:-1], count, 2))

    sums = parts.sum(axis=0).reshape(count, 2)
    each = sums[:, 0] / sums[:, 1]
    drawn = metrics_lib.bootstrap(parts, mean)
    if np.isin(each, (0, 1)).all():
        ends = np.mean([at_an_end(ratio, len(examples)) for ratio in each], axis=0)
        drawn = Share(drawn.value, float(ends[1]), float(ends[2]))
    return Figure(drawn, examples)


def at_an_end(value: float, total: int) -> Share:
    """A figure of 0 or 1 over independent examples, with its Wilson interval."""
    return metrics_lib.wilson(round(value) * total, total)


def drawn(value: float, draws: Float[np.ndarray, " resamples"], total: int) -> Figure:
    """A figure that is no mean of ratios, with the interval of its draws over the examples.

    At 0 or 1 it has Wilson's, since every draw is as it is.
    """
    return Figure(
        at_an_end(value, total) if value in (0, 1) else metrics_lib.interval(value, draws)
    )


def ratio_mean(sums: Float[np.ndarray, "... ratios 2"]) -> np.ndarray:
    """From sums over examples to the figure."""
    return (sums[..., 0] / sums[..., 1]).mean(axis=-1)


def share(right: Bool[np.ndarray, " examples"]) -> Figure:
    """A share of examples that are independent of each other, with its Wilson interval.

    The bootstrap's interval of a share of 0 or 1 is a point, whatever the number of examples.
    """
    examples = np.stack([right, np.ones_like(right)], axis=-1)[:, None].astype(np.float32)
    return Figure(metrics_lib.wilson(int(right.sum()), len(right)), examples)


def exactly(value: float) -> Figure:
    """A number without chance in it."""
    return Figure(Share(float(value), float(value), float(value)), exact=True)


def flat(figures: Mapping[str, Figure]) -> dict[str, float]:
    """What ``metrics.json`` holds: each figure, and its interval's ends unless it is exact."""
    found: dict[str, float] = {}
    for key, figure in figures.items():
        value, low, high = figure.share
        found[key] = value
        if not figure.exact:
            found |= {f"{key}_low": low, f"{key}_high": high}
    return found


def examples(figures: Mapping[str, Figure]) -> dict[str, np.ndarray]:
    """The examples of the figures that have some, by key."""
    return {k: figure.examples for k, figure in figures.items() if figure.examples is not None}
