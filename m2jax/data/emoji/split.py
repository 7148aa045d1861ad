# SPDX-License-Identifier: Apache-2.0
"""Which concepts and drawings training may see. Everything follows from fixed hashes of names."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence

from m2jax.data.emoji.concepts import Concept

UNSEEN_SHARE = 0.1  # of the concepts that training styles draw, within each group
VALIDATION_SHARE = 0.05  # of the training styles' drawings of seen concepts
KEPT = 2  # other drawings a concept must keep in training when one of its is held out


def fraction(text: str) -> float:
    """A fixed number in [0, 1) for a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def mark_unseen(
    concepts: Sequence[Concept], drawn: Mapping[str, Mapping[int, str]]
) -> list[Concept]:
    """Holds out about a tenth of the bases of each group; whole bases, so no sibling leaks.

    Args:
        concepts: all of them.
        drawn: concept id -> icon, by training style.

    Returns:
        The concepts with ``seen`` set; what no training style draws is unseen too.
    """
    in_training = set().union(*drawn.values())
    members: dict[tuple[int, str], list[int]] = collections.defaultdict(list)
    for concept in concepts:
        if concept.id in in_training:
            members[concept.group, concept.base].append(concept.id)
    sizes = collections.Counter(c.group for c in concepts if c.id in in_training)
    unseen: set[int] = set()
    held: collections.Counter[int] = collections.Counter()
    ordered = sorted(members.items(), key=lambda item: fraction(f"unseen {item[0][1]}"))
    for (group, _), ids in ordered:
        if held[group] + len(ids) <= round(UNSEEN_SHARE * sizes[group]):
            unseen.update(ids)
            held[group] += len(ids)
    seen = in_training - unseen
    return [dataclasses.replace(concept, seen=concept.id in seen) for concept in concepts]


def validation(
    concepts: Sequence[Concept], drawn: Mapping[str, Mapping[int, str]]
) -> set[tuple[str, int]]:
    """The (training style, concept id) pairs kept out of training for tuning.

    Chosen by hash among seen concepts, and only while ``KEPT`` other drawings stay in training.
    """
    styles = {c.id: [s for s, icons in drawn.items() if c.id in icons] for c in concepts if c.seen}
    chosen = set()
    for concept in concepts:
        left = list(styles.get(concept.id, ()))
        for style in tuple(left):
            wanted = fraction(f"validation {style} {concept.hexcode}") < VALIDATION_SHARE
            if wanted and len(left) > KEPT:
                left.remove(style)
                chosen.add((style, concept.id))
    return chosen
