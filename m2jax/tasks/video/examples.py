# SPDX-License-Identifier: Apache-2.0
"""Training examples of copies: pairs of feature sequences with their copied segments.

They come from videos whose copies are labelled (really edited clips: see ``simulate``), and from
simulated sequences: shots of features that walk on the sphere, into which noisy pieces of another
sequence are put at another speed. How they are simulated and varied is our own choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from m2jax.config import UserError

BOXES = 8  # of an example, at most
SHORTEST = 3.0  # frames of a segment that is still one
POSITIVE = 0.75  # share of labelled examples with a copy, where there are any
SPEEDS = (0.5, 0.75, 1.0, 1.0, 1.0, 1.5, 2.0)  # of simulated copies


class Pair(NamedTuple):
    """Two videos and what one copied of the other."""

    query: Float[np.ndarray, "query dim"]
    reference: Float[np.ndarray, "reference dim"]
    # [query start, reference start, query end, reference end] in frames, ends exclusive
    boxes: Float[np.ndarray, "segments 4"]


class Corpus(NamedTuple):
    """Labelled pairs of videos."""

    features: Mapping[str, Float[np.ndarray, "frames dim"]]
    pairs: Sequence[tuple[str, str]]
    boxes: Sequence[Sequence[Sequence[float]]]  # of each pair

    def pair(self, number: int) -> Pair:
        """One of them."""
        query, reference = self.pairs[number]
        boxes = np.array(self.boxes[number], np.float64).reshape(-1, 4)
        return Pair(self.features[query], self.features[reference], boxes)


class Batch(NamedTuple):
    """Examples of one shape; arrays of NumPy or, in a compiled step, of JAX."""

    query: Any  # [batch, frames, dim] float32, zeros behind
    reference: Any
    lengths: Any  # [batch, 2] frames of both
    boxes: Any  # [batch, boxes, 4] float32
    real: Any  # [batch, boxes] bool: which boxes are no padding
    views: Any  # [batch, 2, frames] of each frame its copy's in the other video, or -1


def clip(pair: Pair, query: slice, reference: slice) -> Pair:
    """The part of a pair between these frames, with the segments that go on to be there."""
    kept = []
    low = np.array([query.start, reference.start], np.float64)
    high = np.array([query.stop, reference.stop], np.float64)
    for box in pair.boxes:
        start, end = box[:2], box[2:]
        if (end - start < SHORTEST).any():
            continue
        # A copy runs evenly: shares of it at which either video is inside.
        share = (np.stack([low, high]) - start) / (end - start)
        first, last = max(0.0, share[0].max()), min(1.0, share[1].min())
        cut = np.concatenate([start + first * (end - start), start + last * (end - start)])
        if last > first and (cut[2:] - cut[:2] >= SHORTEST).all():
            kept.append(cut - np.concatenate([low, low]))
    boxes = np.array(kept, np.float64).reshape(-1, 4)
    return Pair(pair.query[query], pair.reference[reference], boxes)


def vary(pair: Pair, rng: np.random.Generator, *, frames: int) -> Pair:
    """A random part of a pair of at most so many frames each, perhaps backward, with noise."""
    step = 2 if rng.random() < 0.25 and min(map(len, pair[:2])) > frames // 2 else 1
    pair = Pair(pair.query[::step], pair.reference[::step], pair.boxes / step)
    ranges = []
    for own in pair[:2]:
        size = int(min(len(own), frames))
        if rng.random() < 0.5:
            size = int(rng.integers(max(1, size // 2), size + 1))
        start = int(rng.integers(0, len(own) - size + 1))
        ranges.append(slice(start, start + size))
    query, reference, boxes = clip(pair, *ranges)
    if rng.random() < 0.5:  # both backward: a copy runs forward still
        lengths = np.array([len(query), len(reference)] * 2)
        boxes = (lengths - boxes)[:, [2, 3, 0, 1]]
        query, reference = query[::-1], reference[::-1]
    if rng.random() < 0.5:
        query, reference, boxes = reference, query, boxes[:, [1, 0, 3, 2]]
    level = rng.uniform(0, 0.6) if rng.random() < 0.5 else 0.0
    return Pair(_noisy(query, level, rng), _noisy(reference, level, rng), boxes)


def simulated(rng: np.random.Generator, dim: int, *, frames: int) -> Pair:
    """A pair of simulated sequences with none to four copied segments."""
    common = _unit(rng.normal(size=dim)) * rng.uniform(0, 0.7)
    lengths = rng.integers(max(8, frames // 4), frames + 1, 2)
    query, reference = (_shots(rng, int(length), common) for length in lengths)
    boxes: list[list[float]] = []
    free = 0
    for _ in range(int(rng.choice([0, 1, 1, 1, 2, 2, 3, 4]))):
        speed = float(rng.choice(SPEEDS))
        most = int(min(len(reference), len(query) * speed))
        size = int(rng.integers(min(5, most * 4 // 5), most * 4 // 5 + 1))
        count = round(size / speed)
        room = len(query) - free - count
        if room < 0 or count < SHORTEST or size < SHORTEST:
            continue
        q = free + int(rng.integers(0, room // 2 + 1))
        r = int(rng.integers(0, len(reference) - size + 1))
        taken = r + np.minimum((np.arange(count) * speed).astype(int), size - 1)
        query[q : q + count] = _noisy(reference[taken], rng.uniform(0.1, 1.2), rng)
        boxes.append([q, r, q + count, r + size])
        free = q + count
    return Pair(query, reference, np.array(boxes, np.float64).reshape(-1, 4))


def batch(
    corpus: Corpus | None,
    rng: np.random.Generator,
    *,
    size: int,
    frames: int,
    dim: int,
    share: float,
) -> Batch:
    """Random examples.

    Args:
        corpus: labelled pairs; ``None``: simulated ones alone.
        rng: decides everything.
        size: of the batch.
        frames: of a video, at most.
        dim: of the features.
        share: of simulated examples.
    """
    pairs = []
    copied = [n for n, own in enumerate(corpus.boxes) if len(own)] if corpus else []
    for _ in range(size):
        if corpus is None or rng.random() < share:
            pair = simulated(rng, dim, frames=frames)
        elif copied and rng.random() < POSITIVE:
            pair = corpus.pair(int(rng.choice(copied)))
        else:
            pair = corpus.pair(int(rng.integers(len(corpus.pairs))))
        pairs.append(vary(pair, rng, frames=frames))
    return stack(pairs, frames)


def stack(pairs: Sequence[Pair], frames: int) -> Batch:
    """Pairs padded to one shape; of more than 8 segments the longest stay."""
    dim = pairs[0].query.shape[1]
    videos = np.zeros((2, len(pairs), frames, dim), np.float32)
    lengths = np.array([[len(pair.query), len(pair.reference)] for pair in pairs])
    boxes, real = np.zeros((len(pairs), BOXES, 4)), np.zeros((len(pairs), BOXES), bool)
    views = np.full((len(pairs), 2, frames), -1)
    for row, pair in enumerate(pairs):
        for side in (0, 1):
            videos[side, row, : lengths[row, side]] = pair[side]
        own = pair.boxes[np.argsort(-(pair.boxes[:, 2] - pair.boxes[:, 0]), kind="stable")][:BOXES]
        boxes[row, : len(own)], real[row, : len(own)] = own, True
        for box in own:
            for side in (0, 1):
                _see(views[row, side], box, side, int(lengths[row, 1 - side]))
    return Batch(videos[0], videos[1], lengths, boxes.astype(np.float32), real, views)


def _see(views: np.ndarray, box: np.ndarray, side: int, other: int) -> None:
    """Writes which frames of the other video show what this side's frames of a segment do."""
    first, last = int(np.ceil(box[side])), int(np.floor(box[side + 2]))
    frames = np.arange(first, last)
    speed = (box[3 - side] - box[1 - side]) / (box[side + 2] - box[side])
    place = box[1 - side] + (frames + 0.5 - box[side]) * speed
    views[first:last] = np.clip(place.astype(int), 0, other - 1)


def check(corpus: Corpus, what: str) -> int:
    """The width of a corpus' features.

    Raises:
        UserError: no pairs, a video without features, or features of two widths.
    """
    if not corpus.pairs:
        raise UserError(f"{what}: no pairs to train with: label some")
    widths = {name: own.shape[1] for name, own in corpus.features.items()}
    lost = [name for pair in corpus.pairs for name in pair if name not in widths]
    if lost:
        raise UserError(f"{what}: no features of {lost[0]:.80}: make them, or drop its pairs")
    first = next(iter(widths))
    for name, width in widths.items():
        if width != widths[first]:
            raise UserError(
                f"{what}: features of {first:.40} and {name:.40} have {widths[first]} and {width} "
                "numbers: use those of one model"
            )
    return widths[first]


def _shots(rng: np.random.Generator, length: int, common: np.ndarray) -> np.ndarray:
    """Unit features of a video: shots of random length, each a walk; some hold still."""
    found, dim = np.empty((length, len(common)), np.float32), len(common)
    position = 0
    while position < length:
        count = int(min(length - position, rng.integers(4, 60)))
        pace = rng.choice([0.02, 0.1, 0.2, 0.4])
        walk = np.cumsum(rng.normal(size=(count, dim)) * pace / dim**0.5, axis=0)
        found[position : position + count] = _unit(common + _unit(rng.normal(size=dim)) + walk)
        position += count
    return found


def _noisy(features: np.ndarray, level: float, rng: np.random.Generator) -> np.ndarray:
    """Unit rows turned by noise of so much length: one direction for all, and one for each."""
    if not level:
        return features
    dim = features.shape[1]
    shared, own = rng.normal(size=dim), rng.normal(size=features.shape)
    return _unit(features + (shared + own) * (level / (2 * dim) ** 0.5)).astype(np.float32)


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)
