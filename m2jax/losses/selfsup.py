# SPDX-License-Identifier: Apache-2.0
"""Contrast of two views of an image with each other: SimCLR's with a hinge, MoCo-v3's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def info_nce(
    features: Float[Array, "rows dim"],
    pair: Int[Array, " rows"],
    *,
    temperature: float = 0.07,
    smoothing: float = 0.1,
) -> Float[Array, ""]:
    """SimCLR's loss (Chen et al. 2020, equation 1) with smoothed labels.

    Each row is to be told from all others by being most like its one partner. Smoothing spreads a
    share of the target evenly over the partner and all negatives, as the snake contest's code did.

    Args:
        features: of both views, any length; cosines are taken.
        pair: rows with one number are two views of one image, and there are exactly two of each.
        temperature: divides the cosines.
        smoothing: of the labels; 0 for SimCLR's own loss.
    """
    unit = _unit(features)
    cosines = unit @ unit.T / temperature
    partner, itself = _partner(pair)
    logs = jax.nn.log_softmax(jnp.where(itself, -jnp.inf, cosines), axis=-1)
    own = jnp.where(partner, logs, 0.0).sum(axis=-1)
    mean = jnp.where(itself, 0.0, logs).sum(axis=-1) / (len(features) - 1)
    return -((1 - smoothing) * own + smoothing * mean).mean()


def hardest_negative(
    features: Float[Array, "rows dim"], pair: Int[Array, " rows"], *, margin: float = 0.3
) -> Float[Array, ""]:
    """Mean max(0, margin + largest cosine to another image - cosine to the partner)."""
    unit = _unit(features)
    cosines = unit @ unit.T
    partner, itself = _partner(pair)
    near = jnp.where(partner, cosines, 0.0).sum(axis=-1)
    far = jnp.where(partner | itself, -jnp.inf, cosines).max(axis=-1)
    return jnp.maximum(far - near + margin, 0.0).mean()


def moco_v3(
    query: Float[Array, "batch dim"], key: Float[Array, "batch dim"], *, temperature: float = 0.2
) -> Float[Array, ""]:
    """2 T x cross-entropy of each query with its own key (Chen et al. 2021, equation 1).

    One direction of the symmetric loss; the key, of the momentum encoder, gets no gradient.
    """
    logits = _unit(query) @ jax.lax.stop_gradient(_unit(key)).T / temperature
    logs = jnp.diagonal(jax.nn.log_softmax(logits, axis=-1))
    return -2 * temperature * logs.mean()


def _partner(pair: Array) -> tuple[Bool[Array, "rows rows"], Bool[Array, "rows rows"]]:
    itself = jnp.eye(len(pair), dtype=bool)
    return (pair[:, None] == pair[None]) & ~itself, itself


def _unit(x: Array) -> Array:
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(axis=-1, keepdims=True), 1e-24))
