# SPDX-License-Identifier: Apache-2.0
"""mAP and CMC of re-identification, as Market-1501 defines them (Zheng et al. 2015).

Of the gallery a query is shown all but the images of its own identity by its own camera. Queries
whose identity no other camera saw are left out. Distractors (an identity that no query has) stay.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from m2jax.config import UserError
from m2jax.tasks import ranking
from m2jax.tasks.ranking import Scores

TOP = 50  # ranks of the CMC curve


class Labels(NamedTuple):
    """Who is seen by which camera, image by image."""

    identities: Int[np.ndarray, " images"]
    cameras: Int[np.ndarray, " images"]


class Reid(NamedTuple):
    """Results over the queries that have a match."""

    mean_ap: float
    cmc: Float[np.ndarray, " top"]  # [r]: share of queries with a match among r + 1
    queries: int  # that have one


def relevance(queries: Labels, gallery: Labels) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Right and ignored rows of the gallery of each query.

    Raises:
        UserError: no query has a right one.
    """
    rows: dict[int, list[int]] = {}
    for row, identity in enumerate(gallery.identities.tolist()):
        rows.setdefault(identity, []).append(row)
    by_identity = {identity: np.array(each) for identity, each in rows.items()}
    right, ignored, none = [], [], np.zeros(0, np.int64)
    for identity, camera in zip(queries.identities.tolist(), queries.cameras, strict=True):
        same = by_identity.get(identity, none)
        own = gallery.cameras[same] == camera
        right.append(same[~own])
        ignored.append(same[own])
    if not any(len(each) for each in right):
        raise UserError("re-ID: no query has a match by another camera: nothing can be measured")
    return right, ignored


def evaluate(scores: Scores, queries: Labels, gallery: Labels, *, top: int = TOP) -> Reid:
    """Mean average precision and CMC of scores of the gallery for the queries.

    Args:
        scores: as ``ranking.FeatureScores`` or ``MatrixScores`` give them.
        queries: labels of the queries.
        gallery: labels of the gallery.
        top: ranks of the CMC curve; no more than the gallery has.

    Raises:
        UserError: labels and scores do not fit, or no query has a match.
    """
    _check(scores, queries, gallery)
    found = ranking.hits(scores, *relevance(queries, gallery))
    valid = [ranks for ranks in found.ranks if len(ranks)]
    # (j + 1) / (rank + 1) is the precision at the j-th hit.
    ap = [((np.arange(len(ranks)) + 1) / (ranks + 1)).mean() for ranks in valid]
    first = np.array([ranks[0] for ranks in valid])
    cmc = (first[:, None] <= np.arange(min(top, scores.shape[1]))).mean(0)
    return Reid(float(np.mean(ap)), cmc, len(valid))


def _check(scores: Scores, queries: Labels, gallery: Labels) -> None:
    for what, labels, count in (
        ("queries", queries, scores.shape[0]),
        ("gallery", gallery, scores.shape[1]),
    ):
        if not len(labels.identities) == len(labels.cameras) == count:
            raise UserError(
                f"re-ID: {what}: {count} images, {len(labels.identities)} identities and "
                f"{len(labels.cameras)} cameras: give one of each per image"
            )
