# SPDX-License-Identifier: Apache-2.0
"""A multi-label test made of emoji: two to four drawings of different things on a white square.

Composed scenes, not photographs. Styles and labels can be held out apart from each other: the test
styles are those that pretraining never saw, and held-out labels those that no sentence names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int
from PIL import Image

from m2jax.config import UserError
from m2jax.data.emoji import Drawings, EmojiData
from m2jax.data.emoji.scenes import GRID, of_concepts
from m2jax.eval.sets.records import Made
from m2jax.tasks.labels import vocabulary
from m2jax.tasks.labels.vocabulary import Vocabulary

SMALLEST = 20  # pixels of a drawing's side
HALF = GRID // 2
SEED = 11


class Chosen(NamedTuple):
    """Labels of a test: the seen ones first, the held-out ones after them."""

    words: Vocabulary
    concepts: Int[np.ndarray, " labels"]
    seen: int


class Scenes(NamedTuple):
    """Pictures and what they show."""

    images: Made
    shown: Bool[np.ndarray, "scenes labels"]


def choose(data: EmojiData, seen: int, held: int, *, concepts: int = 0) -> Chosen:
    """So many concepts that every style trained on draws, spread over Unicode's order.

    One concept of each ``base`` is taken (a woman and a man doing one thing are two names of what
    looks alike), and none whose names another bears.

    Args:
        data: the drawings.
        seen: labels that sentences name.
        held: labels that none does.
        concepts: choose among so many alone, those of a model trained with ``data.concepts``.

    Raises:
        UserError: there are not as many.
    """
    styles = (of_concepts(data, data.drawings(s), concepts) for s in ("fluent", "openmoji"))
    drawn = set.intersection(*(set(style.concept.tolist()) for style in styles))
    usable, bases, names = [], set[str](), set[str]()
    for concept in data.concepts:
        own = {vocabulary.folded(name) for name in concept.names.values()}
        if concept.seen and concept.id in drawn and concept.base not in bases and not own & names:
            usable.append(concept.id)
            bases.add(concept.base)
            names |= own
    if seen + held > len(usable) or seen < 2:
        raise UserError(f"emoji scenes: {seen} + {held} labels: use 2 to {len(usable)} in all")
    picked = np.array(usable)[np.arange(seen + held) * len(usable) // (seen + held)]
    # Held-out labels lie among the others, so that neither part is of one kind.
    out = np.zeros(len(picked), np.bool_)
    out[np.arange(held) * len(picked) // max(held, 1)] = True
    order = np.concatenate([picked[~out], picked[out]])
    rows = [{lang: [name] for lang, name in data.concepts[i].names.items()} for i in order]
    return Chosen(vocabulary.checked(rows), order, seen)


def compose(
    data: EmojiData, drawings: Drawings, chosen: Chosen, count: int, *, seed: int = SEED
) -> Scenes:
    """Scenes of one style; the same for the same seed.

    Args:
        data: tells drawings that are pixel by pixel the same.
        drawings: of one style, or of several: a scene is of one.
        chosen: what may be shown; all of it, seen and held out, side by side.
        count: scenes.
        seed: of them.
    """
    label = {int(concept): n for n, concept in enumerate(chosen.concepts)}
    rows = np.flatnonzero(np.isin(drawings.concept, chosen.concepts))
    alone = np.array([len(names) == 1 for names in data.answers(drawings)])
    rows = rows[alone[rows]]
    styles = np.array(drawings.style)[rows]
    shown = np.zeros((count, len(label)), np.bool_)
    plans: list[list[tuple[int, tuple[int, int, int]]]] = []
    for number in range(count):
        rng = np.random.default_rng((seed, number))
        of_style = rows[styles == styles[rng.integers(len(rows))]]
        items = rng.choice(of_style, min(int(rng.integers(2, 5)), len(of_style)), replace=False)
        places = rng.permutation(4)[: len(items)]
        plans.append([(int(i), _box(int(p), rng)) for i, p in zip(items, places, strict=True)])
        shown[number, [label[int(drawings.concept[i])] for i in items]] = True
    return Scenes(Made(count, lambda number: _render(drawings, plans[number])), shown)


def _box(quarter: int, rng: np.random.Generator) -> tuple[int, int, int]:
    """Left, top and side of a drawing somewhere in a quarter of the picture."""
    side = int(rng.integers(SMALLEST, HALF + 1))
    x, y = (int(rng.integers(0, HALF - side + 1)) for _ in range(2))
    return quarter % 2 * HALF + x, quarter // 2 * HALF + y, side


def _render(drawings: Drawings, items: Sequence[tuple[int, tuple[int, int, int]]]) -> Image.Image:
    canvas = Image.new("RGBA", (GRID, GRID))
    for row, (left, top, side) in items:
        drawing = Image.fromarray(drawings.images[row])
        canvas.alpha_composite(drawing.resize((side, side), Image.Resampling.BOX), (left, top))
    return canvas
