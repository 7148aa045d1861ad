# SPDX-License-Identifier: Apache-2.0
"""Losses for several labels at once: ranking, asymmetric, binary cross-entropy.

Forms and reductions are those of the public code of TaI-DPT (Guo et al. 2023) and of the asymmetric
loss (Ridnik et al. 2021, equations 4 to 7). Which of them TAI-Adapter used is not known.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

Reduction = Literal["sum", "mean", "batch"]  # all entries; their mean; their sum over the rows
LOG_FLOOR = 1e-8  # logarithms are taken of nothing smaller


def ranking_loss(
    logits: Float[Array, "batch classes"],
    targets: Int[Array, "batch classes"] | Bool[Array, "batch classes"],
    *,
    scale: float = 1.0,
    margin: float = 1.0,
) -> Float[Array, ""]:
    """Every wrong label is to stand ``margin`` below every right one (TaI-DPT, section 3.3).

    mean over rows of sum over pairs (p, n) of max(0, margin - scale x_p + scale x_n). A row without
    right or without wrong labels adds 0 and counts in the mean. The pairs are summed one right
    label at a time, so memory grows with the classes and not with their square: a row with more
    than ``classes`` right labels cannot be.

    Args:
        logits: scores.
        targets: 1 at the right labels, 0 at the others.
        scale: of the scores; TaI-DPT's function has 2 by default and is called with 1.
        margin: between a right and a wrong score, after scaling.
    """
    scaled = scale * _wide(logits)
    right = targets != 0
    order = jnp.sort(jnp.where(right, jnp.inf, scaled), axis=1)  # wrong scores, ascending
    count = (~right).sum(axis=1, keepdims=True)
    finite = jnp.where(jnp.isfinite(order), order, 0.0)
    # Sum of the wrong scores from the k-th on, and how many these are: a right score x_p pays for
    # each wrong one above x_p - margin.
    from_k = jnp.cumsum(finite[:, ::-1], axis=1)[:, ::-1]
    from_k = jnp.pad(from_k, ((0, 0), (0, 1)))
    limit = scaled - margin
    first = jax.vmap(lambda row, x: jnp.searchsorted(row, x, side="right"))(
        lax.stop_gradient(order), lax.stop_gradient(limit)
    )
    first = jnp.minimum(first, count)
    above = jnp.take_along_axis(from_k, first, axis=1)
    pairs = above - (count - first) * limit
    return jnp.where(right, pairs, 0.0).sum(axis=1).mean()


def asymmetric_loss(
    logits: Float[Array, "batch classes"],
    targets: Int[Array, "batch classes"] | Bool[Array, "batch classes"],
    *,
    gamma_negative: float = 2.0,
    gamma_positive: float = 1.0,
    clip: float = 0.05,
    focus_gradient: bool = False,
    reduction: Reduction = "mean",
) -> Float[Array, ""]:
    """-sum [y (1-p)^g+ log p + (1-y) pm^g- log(1-pm)], p = sigmoid(x), pm = max(p - clip, 0).

    Args:
        logits: scores.
        targets: 1 right, 0 wrong, -1 not known (left out).
        gamma_negative: focus on hard wrong labels.
        gamma_positive: focus on hard right ones.
        clip: wrong labels below this probability cost nothing.
        focus_gradient: whether a gradient flows through the focusing weights: so in the released
            optimised form, not in the other one, which TaI-DPT uses.
        reduction: ``sum`` (released), ``mean`` over entries (TaI-DPT), ``batch``: sum over rows
            divided by their number (partial labels).
    """
    p = jax.nn.sigmoid(_wide(logits))
    right, wrong = (targets == 1).astype(p.dtype), (targets == 0).astype(p.dtype)
    low = jnp.minimum(1 - p + clip, 1.0) if clip else 1 - p  # 1 - pm
    value = right * jnp.log(jnp.maximum(p, LOG_FLOOR))
    value += wrong * jnp.log(jnp.maximum(low, LOG_FLOOR))
    if gamma_negative or gamma_positive:
        true = p * right + low * wrong
        gamma = gamma_positive * right + gamma_negative * wrong
        # 1 - true is 0 where the clip has cut a label off; its power has no gradient there.
        base = jnp.maximum(1 - true, 0.0)
        safe = jnp.where(base > 0, base, 1.0)
        weight = jnp.where(base > 0, safe**gamma, jnp.where(gamma > 0, 0.0, 1.0))
        value *= weight if focus_gradient else lax.stop_gradient(weight)
    return _reduced(-value, reduction)


def binary_cross_entropy(
    logits: Float[Array, "batch classes"],
    targets: Int[Array, "batch classes"] | Bool[Array, "batch classes"],
    *,
    reduction: Reduction = "mean",
) -> Float[Array, ""]:
    """-[y log p + (1-y) log(1-p)], p = sigmoid(x), from the logits themselves."""
    x, y = _wide(logits), targets.astype(jnp.float32)
    return _reduced(jax.nn.softplus(x) - x * y, reduction)


def _reduced(values: Array, reduction: Reduction) -> Array:
    if reduction == "mean":
        return values.mean()
    return values.sum() / (values.shape[0] if reduction == "batch" else 1)


def _wide(logits: Array) -> Array:
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
