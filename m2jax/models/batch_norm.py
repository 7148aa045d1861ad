# SPDX-License-Identifier: Apache-2.0
"""Batch normalisation (Ioffe and Szegedy 2015) with its state in the open.

The batch is normalised with its biased variance and the running one takes the unbiased, as torch
has it; flax's own layer keeps the biased one.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

MOMENTUM, EPS = 0.1, 1e-5  # share of the new batch in the running statistics; torch's defaults


class Running(NamedTuple):
    """Running statistics of each channel."""

    mean: Float[Array, " dim"]
    var: Float[Array, " dim"]


class Affine(NamedTuple):
    """Scale and shift of each channel."""

    scale: Float[Array, " dim"]
    bias: Float[Array, " dim"]


def fresh(dim: int) -> tuple[Affine, Running]:
    """The identity, and statistics of nothing seen."""
    return Affine(jnp.ones(dim), jnp.zeros(dim)), Running(jnp.zeros(dim), jnp.ones(dim))


def batch_norm(
    x: Float[Array, "batch dim"], affine: Affine, running: Running, *, train: bool
) -> tuple[Float[Array, "batch dim"], Running]:
    """Normalises rows; under ``jax.jit`` on a mesh the statistics are those of the global batch.

    Args:
        x: rows.
        affine: what follows the normalisation.
        running: statistics, taken as they are unless ``train``.
        train: normalise by the batch and move the statistics.

    Returns:
        (normalised rows, running statistics after them).
    """
    if not train:
        return (x - running.mean) * jax.lax.rsqrt(running.var + EPS) * affine.scale + (
            affine.bias
        ), running
    mean = x.mean(0)
    var = jnp.square(x - mean).mean(0)
    seen = jax.lax.stop_gradient(Running(mean, var * len(x) / max(len(x) - 1, 1)))
    moved = jax.tree.map(lambda old, new: (1 - MOMENTUM) * old + MOMENTUM * new, running, seen)
    return (x - mean) * jax.lax.rsqrt(var + EPS) * affine.scale + affine.bias, moved
