# SPDX-License-Identifier: Apache-2.0
"""Scenes composed of emoji drawings, with captions that state what stands where.

Two to four drawings lie on a white square; an English and a Chinese caption tell their relation
(left of, above), their number or their sizes. Everything follows from the seed and the index, and
each drawing's box is known, so it can be measured whether a patch and a word mean the same thing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8
from PIL import Image

from m2jax.config import Data, Experiment, UserError
from m2jax.data.emoji.batches import opened, shrink
from m2jax.data.emoji.dataset import Drawings, EmojiData
from m2jax.data.image import Preprocess
from m2jax.data.text import Tokenizer

GRID = 64  # pixels of a scene before it is scaled to the model's size

# Caption templates by kind: {a} and {b} are names, {n} a number word. Wording is ours.
TEMPLATES = {
    "left": {"en": "{a} to the left of {b}", "zh": "{a}在{b}的左边"},
    "right": {"en": "{a} to the right of {b}", "zh": "{a}在{b}的右边"},
    "above": {"en": "{a} above {b}", "zh": "{a}在{b}的上面"},
    "below": {"en": "{a} below {b}", "zh": "{a}在{b}的下面"},
    "larger": {"en": "a large {a} and a small {b}", "zh": "大的{a}和小的{b}"},
    "count": {"en": "{n} times {a}", "zh": "{n}个{a}"},
}
NUMBERS = {"en": ("two", "three", "four"), "zh": ("两", "三", "四")}
KINDS = tuple(TEMPLATES)
CONVERSE = {"left": "right", "right": "left", "above": "below", "below": "above"}


class Item(NamedTuple):
    """One drawing of a scene."""

    drawing: int  # row of the drawings
    box: tuple[int, int, int, int]  # left, top, right, bottom, in pixels of GRID


class Scene(NamedTuple):
    """What a picture shows; ``render`` draws it."""

    kind: str
    items: tuple[Item, ...]  # the first belongs to {a}; of "count" all do
    names: dict[str, tuple[str, ...]]  # of each item, by language
    captions: dict[str, str]
    statements: dict[str, tuple[str, ...]]  # all the templates say of it, the caption first


def of_concepts(data: EmojiData, drawings: Drawings, count: int) -> Drawings:
    """The drawings of ``count`` seen concepts, spread evenly over Unicode's order; 0: all drawings.

    Unicode puts like beside like, so these differ from each other more than those of a run do.
    """
    if not count:
        return drawings
    seen = np.flatnonzero([concept.seen for concept in data.concepts])
    if not 2 <= count <= len(seen):
        raise UserError(f"data.concepts={count}: the emoji set has {len(seen)}: use 2 to that many")
    chosen = seen[np.arange(count) * len(seen) // count]
    return drawings.where(np.isin(drawings.concept, chosen))


def compose(
    data: EmojiData, drawings: Drawings, rng: np.random.Generator, kind: str | None = None
) -> Scene:
    """A scene of drawings of one style.

    Args:
        data: for the names.
        drawings: what may be drawn.
        rng: decides everything else.
        kind: one of ``KINDS``; drawn if not given.
    """
    kind = kind or KINDS[rng.integers(len(KINDS))]
    first = int(rng.integers(len(drawings)))
    same_style = np.flatnonzero(np.array(drawings.style) == drawings.style[first])
    others = same_style[drawings.concept[same_style] != drawings.concept[first]]
    second = int(others[rng.integers(len(others))])
    number = int(rng.integers(2, 5))
    boxes = _boxes(kind, number, rng)
    shown = [first] * number if kind == "count" else [first, second]
    names = {
        language: tuple(data.concepts[drawings.concept[one]].names[language] for one in shown)
        for language in NUMBERS
    }
    statements = {
        language: _statements(kind, language, names[language], number) for language in NUMBERS
    }
    captions = {language: said[0] for language, said in statements.items()}
    items = tuple(Item(*pair) for pair in zip(shown, boxes, strict=True))
    return Scene(kind, items, names, captions, statements)


def _statements(kind: str, language: str, names: Sequence[str], number: int) -> tuple[str, ...]:
    """The caption, and the same relation told from the other side where there is one."""
    word = NUMBERS[language][number - 2]
    said = [TEMPLATES[kind][language].format(a=names[0], b=names[1], n=word)]
    if kind in CONVERSE:
        said.append(TEMPLATES[CONVERSE[kind]][language].format(a=names[1], b=names[0]))
    return tuple(said)


def _boxes(kind: str, number: int, rng: np.random.Generator) -> list[tuple[int, int, int, int]]:
    """Where the drawings lie; none overlaps another."""
    half, quarter = GRID // 2, GRID // 4

    def inside(left: int, top: int, room: int, low: int, high: int) -> tuple[int, int, int, int]:
        """A square of ``low`` to ``high`` pixels somewhere in a square of ``room``."""
        side = int(rng.integers(low, high + 1))
        x, y = (int(rng.integers(0, room - side + 1)) for _ in range(2))
        return left + x, top + y, left + x + side, top + y + side

    if kind == "count":
        places = rng.permutation(4)[:number]
        return [inside(p % 2 * half, p // 2 * half, half, 20, half) for p in places]
    free = int(rng.integers(0, half + 1))  # across the axis that matters, anywhere
    if kind in ("left", "right", "above", "below"):
        near, far = (inside(0, 0, half, 22, half) for _ in range(2))
        other = int(rng.integers(0, half + 1))
        if kind in ("left", "right"):
            pair = [_moved(near, 0, free), _moved(far, half, other)]
        else:
            pair = [_moved(near, free, 0), _moved(far, other, half)]
        return pair if kind in ("left", "above") else pair[::-1]
    corner = int(rng.integers(4))  # larger: the small one takes a corner, the large the opposite
    x, y = corner % 2, corner // 2
    small = inside(x * 3 * quarter, y * 3 * quarter, quarter, 14, quarter)
    large = inside((1 - x) * quarter, (1 - y) * quarter, 3 * quarter, 40, 3 * quarter)
    return [large, small]


def _moved(box: tuple[int, int, int, int], x: int, y: int) -> tuple[int, int, int, int]:
    return box[0] + x, box[1] + y, box[2] + x, box[3] + y


def render(scene: Scene, drawings: Drawings) -> UInt8[np.ndarray, "64 64 4"]:
    """The picture: straight-alpha RGBA."""
    canvas = Image.new("RGBA", (GRID, GRID))
    for item in scene.items:
        left, top, right, bottom = item.box
        drawing = Image.fromarray(drawings.images[item.drawing])
        drawing = drawing.resize((right - left, bottom - top), Image.Resampling.BOX)
        canvas.alpha_composite(drawing, (left, top))
    return np.asarray(canvas)


class SceneBatches:
    """Batch ``index`` of scenes, from the seed and the index alone.

    Args:
        data: the drawings and their names.
        cfg: batch size, languages, held-out styles.
        tokenizer: turns captions into ids.
        size: side of the images, pixels; divides ``GRID``.
        seed: of the run.
    """

    def __init__(
        self,
        data: EmojiData,
        cfg: Data,
        tokenizer: Tokenizer,
        *,
        size: int,
        seed: int,
    ) -> None:
        if GRID % size:
            raise UserError(f"model.image_size={size}: scenes have {GRID} pixels: use a divisor")
        if cfg.views != 1:
            raise UserError(f"data.views={cfg.views}: a scene is drawn once: set it to 1")
        if cfg.augment.flip:
            raise UserError(
                f"data.augment.flip={cfg.augment.flip}: a mirrored scene belies its caption: set "
                "it to 0"
            )
        self._data, self._cfg, self._size, self._seed = data, cfg, size, seed
        drawings = data.drawings("train", hold_out_styles=cfg.hold_out_styles)
        self._drawings = of_concepts(data, drawings, cfg.concepts)
        self._tokenizer = tokenizer
        preprocess = Preprocess(size, background="white")
        self.assets: dict[str, Any] = {
            "tokenizer": tokenizer.to_dict(),
            "preprocess": preprocess.to_dict(),
        }

    @classmethod
    def of(cls, experiment: Experiment, assets: Mapping[str, Any] | None = None) -> SceneBatches:
        """The scenes of an experiment; builds the data set if it is not there.

        Args:
            experiment: the run.
            assets: of the model that the run starts from: its tokenizer is kept.
        """
        data, tokenizer = opened(experiment, assets)
        size, seed = experiment.model.image_size, experiment.train.seed
        return cls(data, experiment.data, tokenizer, size=size, seed=seed)

    def batch(self, index: int, rows: slice) -> dict[str, np.ndarray]:
        """Rows of batch ``index``; as of ``EmojiBatches``, and ``concept`` numbers the scenes."""
        numbers = range(self._cfg.batch_size)[rows]
        rngs = [np.random.default_rng((self._seed, 2, index, n)) for n in numbers]
        scenes = [compose(self._data, self._drawings, rng) for rng in rngs]
        images = np.stack([render(scene, self._drawings) for scene in scenes])
        texts = [
            self._tokenizer([scene.captions[language] for scene in scenes])
            for language in self._cfg.languages
        ]
        return {
            "image": shrink(images, self._size)[:, None],
            "text": np.stack([t.ids for t in texts], axis=1),
            "text_mask": np.stack([t.mask for t in texts], axis=1),
            "concept": _numbers(index, self._cfg.batch_size, numbers),
        }


def _numbers(index: int, size: int, rows: range) -> Int32[np.ndarray, " n"]:
    """A number per scene; wraps around after 2 ** 31 of them."""
    return ((index * size + np.arange(rows.start, rows.stop)) % 2**31).astype(np.int32)
