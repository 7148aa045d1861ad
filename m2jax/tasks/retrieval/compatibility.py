# SPDX-License-Identifier: Apache-2.0
"""How good and how safe an upgrade of an embedding model is: three scores and a verdict.

P_up says how the new model compares with one trained alone, P_comp how well its queries search the
old model's vectors, P_1 both. The formulas are fitted to the tables that AdvBCT's authors publish
(Pan et al. 2023, arXiv 2305.19812) and give them to 0.01; the paper's own words were not at hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from m2jax.config import UserError


class Measured(NamedTuple):
    """One data set's retrieval metric (any, all of one unit) by who made queries and gallery."""

    old: float  # old model, both
    new: float  # new model, both: the self-test
    cross: float  # queries new, gallery old: the cross-test
    alone: float  # a new model trained without regard to the old, both


class Scores(NamedTuple):
    """In per cent; 50 is a new model as good as one trained alone, or no better than the old."""

    p_up: float
    p_comp: float
    p_1: float


def compatibility(sets: Mapping[str, Measured] | Sequence[Measured]) -> Scores:
    """Scores over data sets.

    u = sigmoid((new - alone) / alone), c = sigmoid((cross - old) / (alone - old)); P_up and P_comp
    are their means over data sets, P_1 the mean of the harmonic mean of each data set.

    Raises:
        UserError: no data set, or one where the model trained alone is 0 or no better than the
            old one: there the scores mean nothing.
    """
    named = sets if isinstance(sets, Mapping) else {str(i): each for i, each in enumerate(sets)}
    if not named:
        raise UserError("compatibility: no data set was measured: give at least one")
    up, comp = [], []
    for name, each in named.items():
        if not all(np.isfinite(each)):
            raise UserError(f"compatibility: {name}: a metric is not a number: measure it again")
        if each.alone <= 0 or each.alone <= each.old:
            raise UserError(
                f"compatibility: {name}: the model trained alone ({each.alone:g}) is no better "
                f"than the old one ({each.old:g}): there is no upgrade to score"
            )
        up.append(_sigmoid((each.new - each.alone) / each.alone))
        comp.append(_sigmoid((each.cross - each.old) / (each.alone - each.old)))
    u, c = np.array(up), np.array(comp)
    p_1 = 2 * u * c / (u + c)
    return Scores(*(float(100 * x.mean()) for x in (u, c, p_1)))


def _sigmoid(x: float) -> float:
    return float(1 / (1 + np.exp(-np.clip(x, -500, 500))))
