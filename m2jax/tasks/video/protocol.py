# SPDX-License-Identifier: Apache-2.0
"""VCSL's protocol: which pairs are scored, and the figures of a method."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from m2jax.config import UserError
from m2jax.tasks.video import metric
from m2jax.tasks.video.segments import Boxes


def evaluate(
    labels: Mapping[str, Boxes],
    predictions: Mapping[str, Boxes],
    *,
    pairs: Sequence[str] | None = None,
    query_sets: Mapping[str, Sequence[str]] | None = None,
    missing: Literal["error", "empty"] = "error",
) -> dict[str, float]:
    """The figures of a method on a split.

    Args:
        labels: true segments by pair; pairs without are negatives.
        predictions: predicted segments by pair, ``[]`` for none found.
        pairs: those of the split; all that are labelled or predicted if not given.
        query_sets: names of the pairs of each query set, for the macro figures.
        missing: what a pair without a prediction is.

    Returns:
        ``pairs``, ``positives``, ``recall``, ``precision``, ``f1``, ``frr``, ``far`` and, with
        query sets, ``macro_recall``, ``macro_precision``, ``macro_f1``, ``query_sets``; shares
        between 0 and 1, nan where there is nothing to average.

    Raises:
        UserError: nothing to score, or a prediction is missing.
    """
    keys = list(dict.fromkeys([*labels, *predictions]) if pairs is None else pairs)
    lost = [key for key in keys if key not in predictions]
    if lost and missing == "error":
        raise UserError(
            f"predictions: {len(lost):,} of {len(keys):,} pairs are missing, the first "
            f"{lost[0]:.80}: write [] for none found, or pass --missing empty"
        )
    if not keys:
        raise UserError("predictions: no pairs to score: name a file that holds some")
    if labels and not any(key in labels for key in keys):
        raise UserError(
            f"labels: none is of these pairs (the first is {keys[0]:.80}): "
            "use labels and pairs of one split"
        )
    truth = [labels.get(key, []) for key in keys]
    scores = metric.score([predictions.get(key, []) for key in keys], truth)
    positives = sum(bool(boxes) for boxes in truth)
    negatives = len(keys) - positives
    micro = metric.micro(scores, positives / negatives if negatives else math.inf)
    found: dict[str, float] = {"pairs": len(keys), "positives": positives, **micro._asdict()}
    if query_sets is not None:
        macro = metric.macro(scores, keys, query_sets)
        found |= {
            "macro_recall": macro.recall,
            "macro_precision": macro.precision,
            "macro_f1": macro.f1,
            "query_sets": macro.sets,
        }
    return found
