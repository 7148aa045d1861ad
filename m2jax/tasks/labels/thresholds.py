# SPDX-License-Identifier: Apache-2.0
"""From which score on a label counts as shown, told from sentences alone.

Scores of images lie elsewhere than those of texts (the modality gap), so a threshold of texts is a
first guess: rankings carry over, thresholds less so. They are set on sentences with the noise of
training, which is our choice; no paper was to be had on it.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

FEWEST = 3  # sentences that name a label, for a threshold of its own


def best(
    scores: Float[np.ndarray, "sentences classes"], shown: Bool[np.ndarray, "sentences classes"]
) -> Float[np.ndarray, " classes"]:
    """The threshold with the highest F1 of each label, halfway between two scores.

    A label that fewer than ``FEWEST`` sentences name takes the median of the others'. Where there
    are none, as with ten thousand labels, all take the one that is best for all labels together.
    """
    found = np.full(scores.shape[1], np.nan)
    for label in np.flatnonzero(shown.sum(axis=0) >= FEWEST):
        found[label] = _of_label(scores[:, label], shown[:, label])
    if not np.isfinite(found).any():
        return np.full(scores.shape[1], _of_label(scores.ravel(), shown.ravel()), np.float32)
    middle = np.nanmedian(found)
    return np.where(np.isfinite(found), found, middle).astype(np.float32)


def crossed(
    scores: Float[np.ndarray, "sentences classes"], shown: Bool[np.ndarray, "sentences classes"]
) -> Bool[np.ndarray, "sentences classes"]:
    """What the thresholds of one half find in the other half, both ways.

    A figure of thresholds on the sentences that they were chosen on says how well they fit, not
    how well they find. Sentences stand in random order; one alone is its own half.
    """
    half = len(scores) // 2
    if not half:
        return scores > best(scores, shown)
    first, second = slice(half), slice(half, None)
    return np.concatenate(
        [scores[a] > best(scores[b], shown[b]) for a, b in ((first, second), (second, first))]
    )


def _of_label(scores: np.ndarray, shown: np.ndarray) -> float:
    order = np.argsort(-scores, kind="stable")
    ranked, right = scores[order], shown[order].cumsum()
    taken = np.arange(1, len(order) + 1)
    f1 = 2 * right / (taken + shown.sum())
    f1[:-1][ranked[:-1] == ranked[1:]] = -1  # equal scores are not parted
    last = int(f1.argmax())
    # Below the last one that counts, as float32 has numbers: less 1e-6 is a score of 100 still.
    under = np.nextafter(np.float32(ranked[last]), np.float32(-np.inf))
    if last + 1 == len(ranked):
        return float(under)
    return float(min(np.float32((ranked[last] + ranked[last + 1]) / 2), under))
