# SPDX-License-Identifier: Apache-2.0
"""Position tables for another image size."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.sharding import Sharding
from jaxtyping import Array, Float

from m2jax.config_dual import Architecture, Dual
from m2jax.models.m2 import POSITION_OFFSET


def image_table(cfg: Architecture) -> tuple[str, int]:
    """Dotted name of the image position table, and its rows before those of the patches."""
    if isinstance(cfg, Dual):
        return "vision.positions", int(cfg.vision.pooling == "cls")
    return "image_positions", POSITION_OFFSET + 1


def interpolate(
    table: Float[Array, "rows width"], first: int, rows: int, where: Sharding
) -> Float[Array, "new width"]:
    """The table for another number of patches, by bicubic interpolation of its square grid.

    Args:
        table: ``first`` rows that stand for no patch, kept as they are, then the grid row by row.
        first: how many those are.
        rows: of the new table, ``first`` included.
        where: place of the result.
    """
    run = jax.jit(_interpolate, static_argnums=(1, 2), out_shardings=where)
    return run(table, first, rows)


def _interpolate(table: jax.Array, first: int, rows: int) -> jax.Array:
    side, new = math.isqrt(table.shape[0] - first), math.isqrt(rows - first)
    wide = jnp.promote_types(table.dtype, jnp.float32)
    grid = table[first:].astype(wide).reshape(side, side, -1)
    resized = jax.image.resize(grid, (new, new, grid.shape[-1]), "cubic")
    patches = resized.reshape(new * new, -1).astype(table.dtype)
    return jnp.concatenate([table[:first], patches])
