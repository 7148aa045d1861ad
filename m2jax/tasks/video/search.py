# SPDX-License-Identifier: Apache-2.0
"""Which parts of a video come from which parts of a library's videos.

As SSAN serves it (Jiang et al., ACM MM 2021): the nearest stored frames of each of the query's
frames, a sparse similarity map of each video that was hit, segments of these maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from m2jax.tasks.video import align, arrays, keyframes, maps
from m2jax.tasks.video.align import Aligner
from m2jax.tasks.video.library import Index, Library, edges, features_file
from m2jax.tasks.video.pattern import Keyframes
from m2jax.tasks.video.vectors import Hits, reference_maps

NEAREST = 20  # stored frames per frame of the query; the released SPD masks maps alike


class Match(NamedTuple):
    """A copied segment; times in seconds, ends where the copy is over."""

    video: str
    query_start: float
    query_end: float
    reference_start: float
    reference_end: float
    score: float  # mean over the query's frames of the best similarity in the box, 0 to 1


def search(
    library: Library,
    index: Index,
    features: Float32[np.ndarray, "frames dim"],
    *,
    folder: Path,
    method: Aligner,
    candidates: int = 20,
    nearest: int = NEAREST,
    full_maps: bool = False,
    rescale: bool = True,
    leave_out: str = "",
    choose: Keyframes | None = None,
) -> list[Match]:
    """Finds copied segments.

    Args:
        library: what is searched.
        index: of it.
        features: of the query's frames, at the library's rate.
        folder: of the library.
        method: that finds segments on the maps.
        candidates: videos looked at, those with the most similar frames.
        nearest: stored frames per frame of the query.
        full_maps: similarities of all frames of a candidate, not of the nearest alone.
        rescale: put the library's background at 0, so that thresholds mean the same for all models
            (our choice; see ``library.build``).
        leave_out: a video of the library that is not looked at: the query itself.
        choose: keyframes of the query, where the library holds keyframes.

    Returns:
        Matches, the most similar video's first.
    """
    query = np.arange(len(features) + 1.0)
    if choose is not None:
        kept = choose(features)
        query, features = keyframes.edges(kept, len(features)), features[kept]
    lengths = [video.frames for video in library.videos]
    names = [video.name for video in library.videos]
    # Not dropped behind: its own frames could be all that are nearest to those of a still video.
    without = names.index(leave_out) if leave_out in names else -1
    hits = index.search(features, nearest, library.kind, without)
    background = library.background if rescale else 0.0
    sparse = reference_maps(_rescaled(hits, background), lengths)
    ranked = sorted(sparse, key=lambda number: -float(sparse[number].max(axis=1).sum()))
    ranked = ranked[:candidates]
    found = [sparse[number] for number in ranked]
    if full_maps:
        found = [_full(folder, number, features, background) for number in ranked]
    matches = []
    for number, similarity, segments in zip(ranked, found, align.spans(method, found), strict=True):
        times = keyframes.in_time(segments, query, edges(folder, library, number)) / library.rate
        first, last = np.floor(segments[:, :2]).astype(int), np.ceil(segments[:, 2:]).astype(int)
        for (q0, r0), (q1, r1), (a, c, b, d) in zip(first, last, times.tolist(), strict=True):
            best = similarity[q0:q1, r0:r1].max(axis=1)
            matches.append(Match(library.videos[number].name, a, b, c, d, float(best.mean())))
    return matches


def _rescaled(hits: Hits, background: float) -> Hits:
    return hits._replace(score=_lifted(hits.score, background))


def _lifted(similarity: np.ndarray, background: float) -> np.ndarray:
    """The background at 0 and equality at 1; nothing lies below 0."""
    return np.clip((similarity - background) / (1 - background), 0, 1).astype(np.float32)


def _full(folder: Path, number: int, features: np.ndarray, background: float) -> np.ndarray:
    stored = arrays.read_array(features_file(folder, number), "features")
    return _lifted(maps.cosine(features, stored), background)


def document(
    query: str, frames: int, library: Library, method: str, matches: Sequence[Match]
) -> dict[str, Any]:
    """What the JSON of a search holds."""
    return {
        "query": query,
        "seconds": frames / library.rate,
        "rate": library.rate,
        "model": library.model,
        "method": method,
        "matches": [match._asdict() for match in matches],
    }
