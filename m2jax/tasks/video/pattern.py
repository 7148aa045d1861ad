# SPDX-License-Identifier: Apache-2.0
"""Segments by a trained detector: SPD on similarity maps, SSAN on maps of keyframes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, Int64

from m2jax.config import UserError
from m2jax.tasks.video import align, keyframes, maps, patches
from m2jax.tasks.video.align import Aligner
from m2jax.tasks.video.maps import Boxes, Map
from m2jax.tasks.video.patches import Patch
from m2jax.tasks.video.ssan import Part, new_detector, new_scorer

AT_ONCE = 8  # squares that the detector sees together
LENGTHS = 256  # frames in whole numbers of which an extractor is compiled
JOIN = 0.2  # shares of the short side by which pieces of one segment may miss each other

Spans = Float[np.ndarray, "segments 4"]


@dataclass(frozen=True, eq=False)
class Spd:
    """The detector of copied segments as an aligner, like the classical ones.

    Maps are masked and cut as the released SPD's are; what is larger than the detector's square is
    pooled first. Pieces of a segment that patches cut apart are joined, and boxes end with the map.
    """

    part: Part
    conf: float = 0.3  # score of a segment at least
    nms: float = 0.3  # overlap with a better one up to which a segment counts

    def __post_init__(self) -> None:
        if self.part.detector is None:
            raise UserError("SPD: the trained part has no detector: train spd or ssan")
        for name in ("conf", "nms"):
            if not 0 < getattr(self, name) < 1:
                raise UserError(f"SPD: {name}={getattr(self, name)}: choose between 0 and 1")

    def __call__(self, similarities: Sequence[Map]) -> list[Boxes]:
        """Segments of each map, best first; ends inclusive, as the classical methods give them."""
        return [align.whole(own, end_exclusive=False) for own in self.spans(similarities)]

    def spans(self, similarities: Sequence[Map]) -> list[Spans]:
        """Segments of each map, best first, to parts of a frame; ends exclusive."""
        size = self.part.settings.size
        cut, pooled = [], []
        for number, similarity in enumerate(similarities):
            for patch in patches.split(patches.mask(similarity)):
                values, block = patches.pool(patch.values, size)
                cut.append(
                    (number, patch, block, patches.fit(values.shape[0], values.shape[1], size))
                )
                pooled.append(patches.letterbox(values, size).astype(np.float32))
        pieces: list[list[_Piece]] = [[] for _ in similarities]
        for (number, patch, block, where), raw in zip(cut, self._look(pooled), strict=True):
            seen = patches.select(raw, where, conf=self.conf, nms=self.nms)
            pieces[number] += _pieces(patch, seen, block)
        return [
            _joined(own, similarity.shape)
            for own, similarity in zip(pieces, similarities, strict=True)
        ]

    def _look(self, squares: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        """What the detector says of each square [places, 6], as ``patches.select`` takes it."""
        for first in range(0, len(squares), AT_ONCE):
            some = np.stack(squares[first : first + AT_ONCE])
            rows = np.arange(AT_ONCE) % len(some)  # one shape: compiled once
            scores, boxes = map(np.asarray, self._see(self.part.detector, some[rows]))
            low, high = boxes[..., :2], boxes[..., 2:]
            ones = np.ones_like(scores)
            raw = np.concatenate(
                [(low + high) / 2, high - low, np.stack([scores, ones], axis=-1)], axis=-1
            )
            yield from raw[: len(some)]

    @functools.cached_property
    def _see(self) -> Callable[[Any, np.ndarray], tuple[Any, Any]]:
        graph, _ = nnx.split(new_detector(self.part.settings))

        @jax.jit
        def see(state: Any, squares: Any) -> tuple[Any, Any]:
            seen = nnx.merge(graph, state)(squares)
            return jax.nn.sigmoid(seen.logits), seen.boxes

        return see


class _Piece(NamedTuple):
    """A segment within its patch."""

    span: np.ndarray  # [4] of the map
    score: float


def _pieces(patch: Patch, seen: patches.Found, block: int) -> list[_Piece]:
    x0, y0, x1, y1 = seen.boxes.astype(np.float64).T * block
    q, r = patch.query, patch.reference
    spans = np.stack([y0 + q, x0 + r, y1 + q, x1 + r], axis=1)
    return [_Piece(span, float(score)) for span, score in zip(spans, seen.scores, strict=True)]


def _joined(pieces: list[_Piece], shape: tuple[int, ...]) -> Spans:
    """Best first, within the map; where a patch ends and the next begins, one segment."""
    short, long = min(shape), max(shape)
    spans = [piece.span for piece in pieces]
    scores = [piece.score for piece in pieces]
    if long >= patches.ASPECT * short:
        side = int(shape[1] > shape[0])  # along which the map is cut
        borders = np.arange(1, -(-long // (patches.ASPECT * short))) * patches.ASPECT * short
        for border in borders.tolist():
            _join(spans, scores, border, side, max(1.0, JOIN * short))
    if not spans:
        return np.zeros((0, 4))
    order = np.argsort(-np.array(scores), kind="stable")
    found = np.clip(np.stack(spans)[order], 0, [*shape, *shape])
    return found[(found[:, 2:] > found[:, :2]).all(axis=1)]


def _join(
    spans: list[np.ndarray], scores: list[float], border: int, side: int, apart: float
) -> None:
    """Joins segments that end at a border with those that begin there, at the same other time."""
    across = 1 - side
    for early in range(len(spans)):
        if abs(spans[early][side + 2] - border) > apart:
            continue
        for late in range(len(spans)):
            if late == early or abs(spans[late][side] - border) > apart:
                continue
            if abs(spans[late][across] - spans[early][across + 2]) > apart:
                continue
            low, high = spans[early][:2], spans[late][2:]
            spans[early] = np.concatenate([low, high])
            scores[early] = max(scores[early], scores[late])
            del spans[late], scores[late]
            return _join(spans, scores, border, side, apart)


class Keyframes:
    """Chooses a video's keyframes by a trained extractor, or each window's middle without one.

    Args:
        part: what was trained; its windows are those of its settings.
        most: keyframes whose cosine with the one before is above it are dropped; 1: none.
    """

    def __init__(self, part: Part, most: float = 1.0) -> None:
        self.part, self.most = part, most
        if part.scorer is not None:
            graph, _ = nnx.split(new_scorer(part.settings, part.dim))
            self._score = jax.jit(lambda state, x: nnx.merge(graph, state)(x[None])[0])

    def __call__(self, features: Float[np.ndarray, "frames dim"]) -> Int64[np.ndarray, " kept"]:
        """Frames that are kept, ascending; at least one.

        Raises:
            UserError: the extractor was trained on features of another width.
        """
        length, window = len(features), self.part.settings.window
        if window == 1:
            kept = np.arange(length)
        elif self.part.scorer is None:
            kept = keyframes.uniform(length, window)
        else:
            if features.shape[1] != self.part.dim:
                raise UserError(
                    f"keyframes: trained on features of {self.part.dim} numbers, not of "
                    f"{features.shape[1]}: train on those of this model"
                )
            # Zeros behind, as in training; few lengths, for each is compiled.
            behind = np.pad(features.astype(np.float32), ((0, -length % LENGTHS), (0, 0)))
            logits = np.asarray(self._score(self.part.scorer, behind))[:length]
            kept = keyframes.highest(logits, window)
        return kept if self.most >= 1 else keyframes.unlike(features, kept, self.most)


def chosen(name: str, words: Sequence[str], trained: Part | None) -> Aligner:
    """The method of that name, in either case, with settings ``NAME=VALUE``.

    Raises:
        UserError: an unknown name or setting, a detector is missing, or one is not used.
    """
    if name.upper() != "SPD":
        if trained is not None:
            raise UserError(f"--detector: is not used by {name:.40}: pass --method spd, or drop it")
        if name.upper() not in align.BENCHMARK:
            known = ", ".join((*align.BENCHMARK, "SPD"))
            raise UserError(f"method {name:.40}: unknown: use one of {known}")
        return align.chosen(name.upper(), words)
    if trained is None:
        raise UserError("--method spd: needs --detector DIR: make one with m2jax video train")
    settings = {}
    for word in words:
        key, _, text = word.partition("=")
        if key not in ("conf", "nms"):
            raise UserError(f"SPD: {word:.40}: unknown setting: use conf=NUMBER or nms=NUMBER")
        try:
            settings[key] = float(text)
        except ValueError:
            raise UserError(f"SPD: {word:.40}: no setting: write NAME=NUMBER") from None
    return Spd(trained, **settings)


def check_windows(detector: Part | None, choose: Keyframes | None, flag: str, holder: str) -> None:
    """Whether a detector meets maps like those it was trained on: of one frame in as many.

    Args:
        detector: if there is one.
        choose: the keyframes of the maps; none: all frames.
        flag: what the error calls the detector.
        holder: what it says before the maps' number.

    Raises:
        UserError: it does not.
    """
    window = choose.part.settings.window if choose else 1
    if detector is not None and detector.settings.window != window:
        raise UserError(
            f"{flag}: was trained on one frame of {detector.settings.window}, {holder} one of "
            f"{window}: train one with --window {window}"
        )


def spans_of_features(
    method: Aligner,
    choose: Keyframes,
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
) -> list[Spans]:
    """Segments of pairs of videos on the maps of their keyframes, in frames; ends exclusive.

    Args:
        method: any aligner.
        choose: the keyframes.
        pairs: features of the frames of query and reference.
    """
    kept = [[choose(own) for own in pair] for pair in pairs]
    similarities = [
        maps.cosine(query[k[0]], reference[k[1]])
        for (query, reference), k in zip(pairs, kept, strict=True)
    ]
    found = align.spans(method, similarities)
    return [
        keyframes.in_time(own, *(keyframes.edges(k, len(x)) for k, x in zip(ks, pair, strict=True)))
        for own, ks, pair in zip(found, kept, pairs, strict=True)
    ]
