# SPDX-License-Identifier: Apache-2.0
"""What comes before and after a detector of patterns on similarity maps.

SPD as it was released in VCSL (He et al., CVPR 2022; SSAN, Jiang et al., ACM MM 2021): each query
frame keeps its best reference frames, long maps are cut into patches of 3:1, patches are fitted
into squares, boxes found there are thinned and carried back. A box here is (left, top, right,
bottom): x counts reference frames, y the query's. Segments are (query, reference) as everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int64

from m2jax.tasks.video.maps import Boxes, Map

TOP = 20  # reference frames that a query frame keeps
ASPECT = 3  # of patches; less elongated maps stay whole
MOST = 300  # boxes of a patch
ROWS = 2**24  # cells that are masked at once

Square = Float[np.ndarray, "size size"]


class Patch(NamedTuple):
    """A part of a map."""

    query: int  # first frames
    reference: int
    values: Map


class Fit(NamedTuple):
    """How a patch lies in a square of ``size``: pixels = cells * scale + (left, top)."""

    scale: float
    left: float
    top: float
    height: int  # cells of the patch
    width: int


def mask(similarity: Map, top: int = TOP) -> Map:
    """Clipped to [0, 1], with the ``top`` highest of each row kept and the others 0.

    Of equal similarities those of later reference frames are kept.
    """
    clipped = np.clip(similarity, 0, 1)
    width = clipped.shape[1]
    if width <= top:
        return clipped
    for first in range(0, len(clipped), max(1, ROWS // width)):
        rows = clipped[first : first + max(1, ROWS // width)]
        least = np.partition(rows, width - top, axis=1)[:, width - top, None]
        above, equal = rows > least, rows == least
        room = top - above.sum(axis=1, keepdims=True)
        late = np.cumsum(equal[:, ::-1], axis=1)[:, ::-1] <= room
        rows[~(above | (equal & late))] = 0
    return clipped


def split(masked: Map) -> Iterator[Patch]:
    """The map whole where neither side is 3 times the other, else patches of 3:1, zeros behind.

    Patches with no more than one similarity per frame of the short side are left out, and so is a
    map of zeros alone: the published code fails where that leaves nothing.
    """
    h, w = masked.shape
    if w < ASPECT * h and h < ASPECT * w:
        if masked.any():
            yield Patch(0, 0, masked)
        return
    short, long = min(h, w), max(h, w)
    for first in range(0, long, ASPECT * short):
        query, reference = (first, 0) if h > w else (0, first)
        own = masked[query : query + ASPECT * short if h > w else None]
        own = own[:, reference : None if h > w else reference + ASPECT * short]
        if np.count_nonzero(own) / short <= 1:
            continue
        shape = (ASPECT * short, short) if h > w else (short, ASPECT * short)
        behind = [(0, full - there) for full, there in zip(shape, own.shape, strict=True)]
        yield Patch(query, reference, np.pad(own, behind))


def pool(values: Map, size: int) -> tuple[Map, int]:
    """The largest of each block of cells, so small that the map fits into a square of ``size``.

    Ours, for detectors that are trained here: sampling a long map at the square's points, as the
    published code does, misses most of a thin diagonal.

    Returns:
        The map, and the cells of a block's side; 1 for a map that fits.
    """
    block = -(-max(values.shape) // size)
    if block == 1:
        return values, 1
    behind = [(0, -side % block) for side in values.shape]
    padded = np.pad(values, behind)
    h, w = padded.shape
    return padded.reshape(h // block, block, w // block, block).max(axis=(1, 3)), block


def fit(height: int, width: int, size: int) -> Fit:
    """Where a patch of so many cells lies in a square, by real numbers."""
    scale = min(size / height, size / width)
    return Fit(scale, (size - width * scale) / 2, (size - height * scale) / 2, height, width)


def taps(cells: int, scale: float, size: int) -> Float[np.ndarray, "size cells"]:
    """Weights of the cells in each pixel of a side: bilinear, centres at halves, zeros around."""
    pixels = round(cells * scale)
    before = round((size - pixels) / 2 - 0.1)
    place = (np.arange(pixels) + 0.5) * cells / pixels - 0.5
    low = np.floor(place).astype(int)
    found = np.zeros((size, cells))
    rows = before + np.arange(pixels)
    found[rows, np.maximum(low, 0)] += 1 - (place - low)
    found[rows, np.minimum(low + 1, cells - 1)] += place - low
    return found


def letterbox(values: Map, size: int = 640) -> Square:
    """A patch scaled by one factor and centred in a square of zeros."""
    h, w = values.shape
    scale = fit(h, w, size).scale
    rows, columns = taps(h, scale, size), taps(w, scale, size)
    # Few cells of a large map are looked at: those alone are multiplied.
    r, c = (np.flatnonzero(weights.any(axis=0)) for weights in (rows, columns))
    found = rows[:, r] @ values[np.ix_(r, c)] @ columns[:, c].T
    return found.astype(values.dtype)


def suppress(
    boxes: Float[np.ndarray, "boxes 4"], scores: Float[np.ndarray, " boxes"], iou: float
) -> Int64[np.ndarray, " kept"]:
    """Boxes that no better one overlaps by more than ``iou``, best first; 300 at most."""
    order = np.argsort(-scores, kind="stable")
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    kept: list[int] = []
    while len(order) and len(kept) < MOST:
        best, order = int(order[0]), order[1:]
        kept.append(best)
        low = np.maximum(boxes[best, :2], boxes[order, :2])
        high = np.minimum(boxes[best, 2:], boxes[order, 2:])
        shared = np.maximum(high - low, 0).prod(axis=1)
        # Not shared / union > iou: of two boxes without area neither hides the other.
        order = order[shared <= iou * (areas[best] + areas[order] - shared)]
    return np.array(kept, np.int64)


class Found(NamedTuple):
    """What a detector saw in a patch: boxes in cells of the patch, best first."""

    boxes: Float[np.ndarray, "boxes 4"]
    scores: Float[np.ndarray, " boxes"]


def select(
    raw: Float[np.ndarray, "places 6"], where: Fit, *, conf: float = 0.5, nms: float = 0.3
) -> Found:
    """The boxes of a square that count, in cells of its patch and within it.

    Args:
        raw: of each place of the detector: centre x and y, width, height in pixels, objectness,
            and the class's probability.
        where: the patch.
        conf: objectness, and its product with the probability, lie above it.
        nms: overlap with a better box up to which one is kept.
    """
    scores = raw[:, 4] * raw[:, 5]
    strong: Bool[np.ndarray, " places"] = (raw[:, 4] > conf) & (scores > conf)
    raw, scores = raw[strong], scores[strong]
    half = raw[:, 2:4] / 2
    boxes = np.concatenate([raw[:, :2] - half, raw[:, :2] + half], axis=1)
    kept = suppress(boxes, scores, nms)
    inside = (boxes[kept] - np.array([where.left, where.top] * 2, raw.dtype)) / where.scale
    return Found(np.clip(inside, 0, [where.width, where.height] * 2), scores[kept])


def whole(found: Found, patch: Patch) -> Boxes:
    """Boxes as segments [query start, reference start, query end, reference end] of the map.

    Rounded, as the published code gives them: those in the zeros behind a map lie past its end, a
    segment that goes over several patches is in pieces, and one may have no extent.
    """
    left, top, right, bottom = np.round(found.boxes).astype(np.int64).T
    q, r = patch.query, patch.reference
    return np.stack([top + q, left + r, bottom + q, right + r], axis=1)
