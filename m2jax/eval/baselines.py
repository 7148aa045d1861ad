# SPDX-License-Identifier: Apache-2.0
"""What a model must beat: the nearest drawing in pixels, and chance."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from m2jax.data.emoji import Drawings
from m2jax.eval import metrics as metrics_lib

SIDE = 16  # pixels


def thumbnails(images: UInt8[np.ndarray, "n 64 64 4"]) -> Float[np.ndarray, "n pixels"]:
    """16-pixel images on white, bilinear from 64, flattened, in [0, 1]."""
    rows = np.empty((len(images), SIDE * SIDE * 3), np.float32)
    for row, image in enumerate(images):
        rgba = Image.fromarray(image)
        white = Image.new("RGBA", rgba.size, "white")
        rgb = Image.alpha_composite(white, rgba).convert("RGB")
        small = rgb.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        rows[row] = np.asarray(small, np.float32).reshape(-1) / 255
    return rows


def pixel_nn(
    queries: Drawings, gallery: Drawings, candidates: np.ndarray, right: np.ndarray
) -> np.ndarray:
    """Rank of the right concept by the least squared distance to any gallery drawing of it.

    Args:
        queries: what is recognised.
        gallery: drawings whose concept is known (the training styles).
        candidates: the concepts the gallery shows.
        right: bool [queries, candidates].
    """
    q, g = thumbnails(queries.images), thumbnails(gallery.images)
    distance = (q * q).sum(1)[:, None] - 2 * q @ g.T + (g * g).sum(1)
    best = np.full((len(candidates), len(q)), np.inf, np.float32)
    np.minimum.at(best, np.searchsorted(candidates, gallery.concept), distance.T)
    return metrics_lib.first_right(-best.T, right)


def chance(candidates: int, k: int) -> float:
    """Expected top-k share of a random ranking with one right item."""
    return min(1.0, k / candidates)
