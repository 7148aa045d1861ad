# SPDX-License-Identifier: Apache-2.0
"""A long tail made of emoji: subgroups as classes, as unequal as Unicode made them.

A drawing's ``country`` is its style and its ``code`` the group of its concept, which allows some
subgroups alone, as a place allows some species. The drawings of one concept in the test styles are
one observation. Test styles are countries that training never had: that is meant, since a real
table has such too.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from PIL import Image

from m2jax.data.emoji import Drawings, EmojiData
from m2jax.data.emoji.concepts import GROUPS
from m2jax.eval.sets.records import Made
from m2jax.tasks.longtail.table import Row


class Part(NamedTuple):
    """Images with their table."""

    images: Made
    rows: list[Row]


def part(data: EmojiData, *splits: str) -> Part:
    """The drawings of seen concepts in some splits: ``train``, or the styles of the test."""
    parts = [_of(data, data.drawings(split)) for split in splits]
    images = [image for images, _ in parts for image in images]
    rows = [row for _, rows in parts for row in rows]
    return Part(Made(len(rows), lambda row: images[row]), rows)


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
