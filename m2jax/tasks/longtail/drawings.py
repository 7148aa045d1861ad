# SPDX-License-Identifier: Apache-2.0
"""A long tail made of emoji: subgroups as classes, as unequal as Unicode made them.

A drawing's ``country`` is its style and its ``code`` the group of its concept, which allows some
subgroups alone, as a place allows some species. The drawings of one concept in the test styles are
one observation. Test styles are countries that training never had: that is meant, since a real
table has such too.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool
from PIL import Image

from m2jax.data.emoji import Drawings, EmojiData
from m2jax.data.emoji.concepts import GROUPS
from m2jax.eval.sets.records import Images, Made, Some
from m2jax.tasks.longtail.table import Row


class Part(NamedTuple):
    """Images with their table."""

    images: Images
    rows: list[Row]


def part(data: EmojiData, *splits: str) -> Part:
    """The drawings of seen concepts in some splits: ``train``, or the styles of the test."""
    parts = [_of(data, data.drawings(split)) for split in splits]
    images = [image for images, _ in parts for image in images]
    rows = [row for _, rows in parts for row in rows]
    return Part(Made(len(rows), lambda row: images[row]), rows)


def without_observations(part: Part, share: float, seed: int = 0) -> tuple[Part, Part]:
    """A part without some of its observations, and those, for validation.

    Of each class so large a share of its observations, and at least one where it has two; all
    images of an observation go the same way.

    Args:
        part: to be parted.
        share: of the observations that are held out.
        seed: of the choice.
    """
    of_class: dict[str, list[str]] = {}
    for label, observation in sorted({(row.label, row.observation) for row in part.rows}):
        of_class.setdefault(label, []).append(observation)
    rng = np.random.default_rng(seed)
    held = set[str]()
    for observations in of_class.values():
        count = min(max(1, round(share * len(observations))), len(observations) - 1)
        held.update(rng.permutation(observations)[:count].tolist())
    out = np.array([row.observation in held for row in part.rows])
    return _some(part, ~out), _some(part, out)


def _some(part: Part, chosen: Bool[np.ndarray, " images"]) -> Part:
    rows = np.flatnonzero(chosen).tolist()
    return Part(Some(part.images, rows), [part.rows[row] for row in rows])


def with_classes(part: Part, classes: Collection[str]) -> Part:
    """The images of some classes."""
    return _some(part, np.array([row.label in classes for row in part.rows], np.bool_))


def _of(data: EmojiData, drawings: Drawings) -> tuple[list[Image.Image], list[Row]]:
    images, rows = [], []
    seen = data.is_seen(drawings)
    for number in range(len(drawings)):
        if not seen[number]:
            continue
        concept = data.concepts[drawings.concept[number]]
        side = {
            "code": GROUPS[concept.group],
            "country": drawings.style[number],
            "endemic": "",
        }
        name = Path(drawings.style[number]) / f"{concept.hexcode}.png"
        rows.append(Row(name, concept.hexcode, side, f"{concept.group}.{concept.subgroup}"))
        images.append(Image.fromarray(drawings.images[number]))
    return images, rows
