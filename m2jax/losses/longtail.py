# SPDX-License-Identifier: Apache-2.0
"""Losses for classes of very unequal size: adjusted logits, seesaw, Poly-1, hard examples.

An adjusted loss moves the classes' boundaries while training; ``posthoc`` does so afterwards. Use
one of the two, unless their strengths are meant to add up.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

PRIOR_FLOOR = 1e-12  # under the logarithm of a prior
NUMBER_FLOOR = 1e-8  # of an effective number
SEESAW_FLOOR = 1e-6


def log_prior(counts: Int[Array, " classes"], tau: float = 1.0) -> Float[Array, " classes"]:
    """log(pi^tau + 1e-12), pi the classes' shares (Menon et al. 2021, equation 10).

    A class without an example gets log 1e-12, which no logit outweighs in training; give such a
    class a count of one, or leave it out.
    """
    share = _share(counts)
    return jnp.log(share**tau + PRIOR_FLOOR)


def effective_log_prior(
    counts: Int[Array, " classes"], beta: float = 0.999999
) -> Float[Array, " classes"]:
    """Log of the share of effective numbers (1 - beta^n) / (1 - beta) (Cui et al. 2019, eq. 2)."""
    # 1 - beta^n by expm1: beta near 1 leaves float32 no digits.
    number = -jnp.expm1(jnp.asarray(counts, jnp.float32) * jnp.log1p(jnp.float32(beta - 1.0)))
    return jnp.log(number / number.sum() + NUMBER_FLOOR)


def cross_entropy(
    logits: Float[Array, "batch classes"],
    targets: Int[Array, " batch"] | Float[Array, "batch classes"],
    adjustment: Float[Array, " classes"] | float = 0.0,
) -> Float[Array, " batch"]:
    """Cross-entropy of each row with ``adjustment`` added to the logits.

    With ``log_prior(counts, tau)`` it is logit adjustment; tau = 1 is balanced softmax (Ren et al.
    2020), the same formula from another derivation.

    Args:
        logits: scores.
        targets: class numbers, or a distribution per row.
        adjustment: per class; 0 for none.
    """
    logs = jax.nn.log_softmax(_wide(logits) + adjustment, axis=-1)
    return -(_one_hot(targets, logits.shape[-1]) * logs).sum(axis=-1)


def hardest(losses: Float[Array, " batch"], keep: float) -> Float[Array, ""]:
    """Mean of the int(keep x batch) largest losses, at least one (OHEM, Shrivastava et al. 2016).

    Raises:
        ValueError: ``keep`` is not in (0, 1].
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep={keep}: a share above 0 and up to 1")
    count = max(1, int(keep * losses.shape[0]))
    return jax.lax.top_k(losses, count)[0].mean()


def seesaw(
    logits: Float[Array, "batch classes"],
    targets: Int[Array, " batch"],
    counts: Int[Array, " classes"],
    *,
    p: float = 0.8,
) -> Float[Array, " batch"]:
    """Seesaw loss with its mitigation factor alone (Wang et al. 2021, equations 2 to 4).

    A rarer class j is pushed down by an example of class i with weight (N_j / N_i)^p only. The
    compensation factor is left out, as in the public code of the snake contest. Shares are floored
    by 1e-6 before and after the division, as there.
    """
    x = _wide(logits)
    n = jnp.asarray(counts, x.dtype)
    weight = jnp.where(n[:, None] > n[None], (n[None] / n[:, None]) ** p, 1.0)
    one_hot = _one_hot(targets, x.shape[-1])
    powers = jnp.exp(x - jax.lax.stop_gradient(x.max(axis=-1, keepdims=True)))
    own = (powers * one_hot).sum(axis=-1)
    others = (powers * (1 - one_hot) * weight[targets]).sum(axis=-1)
    return -jnp.log(own / (own + others + SEESAW_FLOOR) + SEESAW_FLOOR)


def poly1(
    logits: Float[Array, "batch classes"],
    targets: Int[Array, " batch"],
    *,
    epsilon: float = 1.0,
) -> Float[Array, " batch"]:
    """Cross-entropy + epsilon (1 - p_target) (Leng et al. 2022, equation 6)."""
    logs = jax.nn.log_softmax(_wide(logits), axis=-1)
    own = jnp.take_along_axis(logs, targets[:, None], axis=-1)[:, 0]
    return -own + epsilon * (1 - jnp.exp(own))


def posthoc(
    logits: Float[Array, "*batch classes"], counts: Int[Array, " classes"], tau: float
) -> Float[Array, "*batch classes"]:
    """Logits less tau log pi, for a model trained without adjustment (Menon et al. 2021, eq. 9)."""
    return _wide(logits) - log_prior(counts, tau)


def _share(counts: Array) -> Array:
    n = jnp.asarray(counts, jnp.float32)
    return n / n.sum()


def _one_hot(targets: Array, classes: int) -> Array:
    return targets if targets.ndim == 2 else jax.nn.one_hot(targets, classes)


def _wide(logits: Array) -> Array:
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
