# SPDX-License-Identifier: Apache-2.0
"""Similarity maps of two videos: row = frame of the query, column = frame of the reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int64

from m2jax.config import UserError

STACK = 2**22  # cells of maps that are swept at once
CHAMFER_TOP = 0.3  # VCSL divides chamfer similarities by it, after clipping

Map = Float[np.ndarray, "query reference"]
Boxes = Int64[np.ndarray, "segments 4"]


def cosine(
    query: Float[np.ndarray, "query dim"],
    reference: Float[np.ndarray, "reference dim"],
    *,
    normalise: bool = False,
) -> Map:
    """Inner products of frame features, which VCSL stores with unit rows.

    Args:
        query: features of the query's frames.
        reference: features of the reference's frames.
        normalise: make the rows unit first.
    """
    if normalise:
        query, reference = (
            x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
            for x in (query, reference)
        )
    return query @ reference.T


def chamfer(
    query: Float[np.ndarray, "query regions dim"],
    reference: Float[np.ndarray, "reference regions dim"],
    *,
    scaled: bool = True,
) -> Map:
    """Symmetric chamfer similarity of region features (ViSiL, Kordopatis-Zilos et al., ICCV 2019).

    The mean over regions of the best match, averaged over both directions.

    Args:
        query: features of regions of the query's frames.
        reference: of the reference's.
        scaled: clip to [0, 0.3] and divide by 0.3, as VCSL does.
    """
    both = np.einsum("aid,bjd->abij", query, reference)
    found = (both.max(axis=2).mean(axis=2) + both.max(axis=3).mean(axis=2)) / 2
    return np.clip(found, 0, CHAMFER_TOP) / CHAMFER_TOP if scaled else found


def checked(similarity: np.ndarray, what: str = "similarity map") -> Map:
    """The map itself, where it is one.

    Raises:
        UserError: not two axes, no cells, no numbers, or not all of them finite.
    """
    found = np.asarray(similarity)
    if found.ndim != 2 or not found.size or found.dtype.kind not in "fiu":
        raise UserError(
            f"{what}: {found.dtype} of shape {found.shape}: pass numbers [query, reference]"
        )
    if not np.isfinite(found).all():
        raise UserError(f"{what}: holds {_odd(found)}: leave frames without features out")
    # Half precision would be compared with thresholds in half precision.
    return found if found.dtype in (np.float32, np.float64) else found.astype(np.float32)


def _odd(values: np.ndarray) -> str:
    return "nan" if np.isnan(values).any() else "infinite values"


def stacks(maps: Sequence[Map]) -> Iterator[tuple[list[int], np.ndarray]]:
    """Maps of like sizes and of one precision, padded with -inf into one array.

    Yields:
        Which maps they are, and their values [maps, rows, columns >= 2].
    """
    order = sorted(range(len(maps)), key=lambda i: (maps[i].dtype.itemsize, *maps[i].shape))
    members: list[int] = []
    rows = columns = 0
    for number in [*order, None]:
        if number is not None:
            n, m = maps[number].shape
            grown = max(rows, n), max(columns, m, 2)
            own = sum(maps[i].size for i in members) + n * m
            fits = (len(members) + 1) * grown[0] * grown[1] <= max(STACK, n * m)
            fits &= (len(members) + 1) * grown[0] * grown[1] <= 2 * own + 64  # padding costs too
            if not members or (fits and maps[number].dtype == maps[members[0]].dtype):
                members.append(number)
                rows, columns = grown
                continue
        if members:
            filled = np.full((len(members), rows, columns), -np.inf, maps[members[0]].dtype)
            for row, i in enumerate(members):
                filled[row, : maps[i].shape[0], : maps[i].shape[1]] = maps[i]
            yield members, filled
        if number is not None:
            members, (rows, columns) = (
                [number],
                (maps[number].shape[0], max(maps[number].shape[1], 2)),
            )


def overlap(box: np.ndarray, others: np.ndarray) -> Float[np.ndarray, " others"]:
    """Intersection over union of a box with others; ends are inclusive, so widths are one more."""
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    shared = np.maximum(high - low + 1, 0).prod(axis=1)
    areas = (others[:, 2:] - others[:, :2] + 1).prod(axis=1) + (box[2:] - box[:2] + 1).prod()
    return shared / (areas - shared)
