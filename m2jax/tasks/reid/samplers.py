# SPDX-License-Identifier: Apache-2.0
"""Which images make a batch: P identities with K images each, at random or the most alike.

Sources: Hermans et al. 2017 (PK); the sampler that DC-Former's authors publish for hard identities,
which we take for that of hard-batch mining (arXiv 2112.04761, same first author).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Float, Int

from m2jax.config import UserError

Similarities = Callable[[int], Float[np.ndarray, " identities"]]  # of all identities to one


class Chunks:
    """One epoch's images of each identity, shuffled and cut into groups of K.

    An identity with fewer than K images is one group, drawn with replacement; what is left over
    after the last whole group is dropped.

    Args:
        labels: identity of each image, from 0.
        k: images of a group.
        rng: of the shuffles.

    Raises:
        UserError: K below 1, no images, or identities that have none.
    """

    def __init__(self, labels: Int[np.ndarray, " images"], k: int, rng: np.random.Generator):
        if k < 1 or not len(labels):
            raise UserError(f"sampler: K={k} of {len(labels)} images: give at least one of each")
        counts = np.bincount(labels)
        if not counts.all():
            raise UserError(
                f"sampler: identity {int(np.argmin(counts))} has no image: number them from 0 "
                "without gaps"
            )
        rows = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])
        self._groups = [self._cut(each, k, rng) for each in rows]

    @staticmethod
    def _cut(rows: np.ndarray, k: int, rng: np.random.Generator) -> list[np.ndarray]:
        if len(rows) < k:
            return [rng.choice(rows, k, replace=True)]
        shuffled = rng.permutation(rows)
        return [shuffled[first : first + k] for first in range(0, len(rows) - k + 1, k)]

    @property
    def left(self) -> Int[np.ndarray, " identities"]:
        """Groups of each identity that were not taken yet."""
        return np.array([len(each) for each in self._groups])

    def take(self, identity: int) -> Int[np.ndarray, " k"]:
        """The next group of an identity."""
        return self._groups[identity].pop(0)


def counts_of_groups(images: Int[np.ndarray, " identities"], k: int) -> np.ndarray:
    """Groups of each identity in an epoch, from its number of images."""
    return np.maximum(np.asarray(images) // k, 1)


def _check(p: int, identities: int) -> None:
    if not 1 <= p <= identities:
        raise UserError(
            f"sampler: P={p} of {identities} identities: choose between 1 and {identities}"
        )


def pk(
    labels: Int[np.ndarray, " images"], p: int, k: int, rng: np.random.Generator
) -> Iterator[Int[np.ndarray, " batch"]]:
    """Batches of P random identities with K images each, while P identities have groups left."""
    chunks = Chunks(labels, k, rng)
    _check(p, len(chunks.left))
    while (remaining := np.flatnonzero(chunks.left)).size >= p:
        chosen = rng.choice(remaining, p, replace=False)
        yield np.concatenate([chunks.take(int(identity)) for identity in chosen])


def window_order(
    similarities: Float[np.ndarray, " identities"], groups: Int[np.ndarray, " identities"], p: int
) -> Iterator[Int[np.ndarray, " p"]]:
    """The published order of identities: a window over one ranking by similarity to an anchor.

    The first P identities that have groups left, again and again; so the same P recur until the
    shortest is used up, and late batches are alike only through the anchor.

    Args:
        similarities: of each identity to the anchor, the anchor's own the highest.
        groups: of each identity in this epoch.
        p: identities of a batch.
    """
    order = np.argsort(-np.asarray(similarities), kind="stable")
    left = np.array(groups)
    while (order := order[left[order] > 0]).size >= p:
        first = order[:p]
        yield first
        left[first] -= 1


def sliding_window(
    labels: Int[np.ndarray, " images"],
    p: int,
    k: int,
    rng: np.random.Generator,
    similarities: Similarities,
) -> Iterator[Int[np.ndarray, " batch"]]:
    """Batches in the published order, from a random anchor."""
    chunks = Chunks(labels, k, rng)
    _check(p, len(chunks.left))
    alike = similarities(int(rng.integers(len(chunks.left))))
    for identities in window_order(alike, chunks.left, p):
        yield np.concatenate([chunks.take(int(identity)) for identity in identities])


def nearest_classes(
    labels: Int[np.ndarray, " images"],
    p: int,
    k: int,
    rng: np.random.Generator,
    similarities: Similarities,
) -> Iterator[Int[np.ndarray, " batch"]]:
    """Batches of a new random anchor each time and its P - 1 nearest that have groups left.

    Our own variant: in every batch, the last too, all identities are alike through their anchor.
    """
    chunks = Chunks(labels, k, rng)
    _check(p, len(chunks.left))
    while (remaining := np.flatnonzero(chunks.left)).size >= p:
        anchor = int(rng.choice(remaining))
        alike = np.array(similarities(anchor), np.float64)
        alike[anchor] = np.inf
        nearest = remaining[np.argsort(-alike[remaining], kind="stable")[:p]]
        yield np.concatenate([chunks.take(int(identity)) for identity in nearest])


SAMPLERS = {"window": sliding_window, "nearest": nearest_classes}
