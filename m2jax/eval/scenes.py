# SPDX-License-Identifier: Apache-2.0
"""The scenes suite: composed pictures whose captions say what stands where, in unseen styles.

Retrieval ranks pictures and captions against each other; a model that writes is scored by its
captions; and one with patch features by whether it points at what is named: does the patch most
like the name of a drawing lie on it? Scenes follow from a fixed seed: every model is asked alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Bool, Float
from PIL import Image

from m2jax.data.emoji import Drawings, EmojiData
from m2jax.data.emoji import scenes as scenes_lib
from m2jax.data.emoji.scenes import Scene
from m2jax.eval import baselines, captions
from m2jax.eval import metrics as metrics_lib
from m2jax.eval.emoji import KS, Encoder, batched, text_features
from m2jax.eval.metrics import Share

COUNT = 500  # scenes per style
SEED = 6


@runtime_checkable
class PatchEncoder(Encoder, Protocol):
    """An encoder that can also say where something is."""

    @property
    def patch_grid(self) -> int:
        """Patches of a side; 0 where they have no features that compare with a text's."""
        ...

    def encode_patches(self, pixels: np.ndarray) -> jax.Array:
        """[b, h, w, 3] in [0, 1] -> unit rows [b, patches, dim], row by row of the picture."""
        ...


@runtime_checkable
class Writer(Protocol):
    """Writes captions: a ``Captioner``, or anything with its methods."""

    @property
    def languages(self) -> tuple[str, ...]:
        """Those it writes."""
        ...

    def __call__(self, images: Sequence[Image.Image], *, language: str) -> list[str]:
        """One caption per image."""
        ...


class Pictures(NamedTuple):
    """Scenes and how they look."""

    scenes: list[Scene]
    images: list[Image.Image]


def pictures(
    data: EmojiData, drawings: Drawings, count: int = COUNT, *, concepts: int = 0
) -> Pictures:
    """The scenes of one style: of seen concepts, and of drawings that go by one name alone.

    Args:
        data: names and concepts.
        drawings: of the style.
        count: scenes.
        concepts: so many of the seen concepts alone; 0: all.
    """
    drawings = scenes_lib.of_concepts(data, drawings, concepts)
    alone = np.array([len(names) == 1 for names in data.answers(drawings)])
    drawings = drawings.where(data.is_seen(drawings) & alone)
    rngs = [np.random.default_rng((SEED, number)) for number in range(count)]
    scenes = [scenes_lib.compose(data, drawings, rng) for rng in rngs]
    return Pictures(scenes, [Image.fromarray(scenes_lib.render(s, drawings)) for s in scenes])


def score_style(
    model: Encoder,
    shown: Pictures,
    *,
    name: str,
    languages: Sequence[str],
    batch: int,
    writer: Writer | None = None,
) -> dict[str, float]:
    """The flat metrics of one style, under ``scenes/NAME/LANGUAGE``, and what chance gives.

    Args:
        model: whose features are scored; pointing needs a ``PatchEncoder``.
        shown: the scenes.
        name: of the style.
        languages: scored one by one.
        batch: pictures or texts at once.
        writer: of captions, in those of the languages that it knows.
    """
    pixels = model.preprocess(shown.images)
    images = batched(lambda i, j: model.encode_image(pixels[i:j]), len(pixels), batch)
    patches, grid = None, 0
    if isinstance(model, PatchEncoder) and model.patch_grid:
        grid = model.patch_grid
        patches = batched(lambda i, j: model.encode_patches(pixels[i:j]), len(pixels), batch)
    found: dict[str, float] = {}
    for language in languages:
        stem = f"scenes/{name}/{language}"
        found |= _retrieval(model, images, shown.scenes, language, batch, stem)
        if writer is not None and language in writer.languages:
            found |= _written(writer, shown, language, batch, stem)
        if patches is not None:
            found |= _pointing(model, patches, grid, shown.scenes, language, batch, stem)
    chance = f"baseline/chance/scenes/{name}"
    guessed = [baselines.chance(len(shown.scenes), k) for k in KS]
    found[f"{chance}/mean_recall"] = float(np.mean(guessed))
    if grid:
        asked = targets(shown.scenes, grid)
        found[f"{chance}/pointing"] = float(np.mean(asked.on.mean(1)))
        # What one gets who tells drawings from the empty ground and no more.
        any_drawing = asked.on.sum(1) / asked.drawn.sum(1)
        found[f"baseline/any_drawing/scenes/{name}/pointing"] = float(np.mean(any_drawing))
    return found


def _spread(key: str, share: Share) -> dict[str, float]:
    """A figure and its interval, flat."""
    return {key: share.value, f"{key}_low": share.low, f"{key}_high": share.high}


def _retrieval(
    model: Encoder,
    images: np.ndarray,
    scenes: Sequence[Scene],
    language: str,
    batch: int,
    stem: str,
) -> dict[str, float]:
    """Recall at 1, 5 and 10 both ways; every picture with the same caption counts as right."""
    texts = [scene.captions[language] for scene in scenes]
    scores = images @ text_features(model, texts, batch).T
    right = np.array(texts)[:, None] == np.array(texts)[None]
    ranks = {
        way: metrics_lib.first_right(*pair)
        for way, pair in (("i2t", (scores, right)), ("t2i", (scores.T, right.T)))
    }
    found = _spread(f"{stem}/mean_recall", metrics_lib.mean_recall(list(ranks.values()), KS))
    for way, of_way in ranks.items():
        for k in KS:
            found |= _spread(f"{stem}/{way}_r{k}", metrics_lib.hits(of_way, k))
    return found


def _written(
    writer: Writer, shown: Pictures, language: str, batch: int, stem: str
) -> dict[str, float]:
    """Caption metrics against everything the templates say of a scene."""
    total, texts = len(shown.images), list[str]()
    batch = min(batch, total)
    for start in range(0, total, batch):  # equal batches, so one shape is compiled
        first = min(start, total - batch)
        texts += writer(shown.images[first : first + batch], language=language)[start - first :]
    references = [scene.statements[language] for scene in shown.scenes]
    # What one gets who knows how captions sound and does not look at the picture.
    blind = [scene.captions[language] for scene in (*shown.scenes[1:], shown.scenes[0])]
    found: dict[str, float] = {}
    for where, said in ((stem, texts), (f"baseline/another_caption/{stem}", blind)):
        scores = captions.score(said, references, language=language)
        for key, share in scores._asdict().items():
            found |= _spread(f"{where}/{key}", share)
    return found


class Targets(NamedTuple):
    """What is pointed at: one row per scene and name in it."""

    scene: np.ndarray  # of each row
    item: list[int]  # of that scene: the first drawing that bears the name
    on: Bool[np.ndarray, "rows patches"]  # patches whose middle lies on a drawing of that name
    drawn: Bool[np.ndarray, "rows patches"]  # or on any drawing of the scene


def targets(scenes: Sequence[Scene], grid: int) -> Targets:
    """The names of all scenes and where their drawings lie on a grid of patches.

    A drawing that holds no patch's middle cannot be pointed at and is left out.
    """
    middles = (np.arange(grid) + 0.5) * scenes_lib.GRID / grid

    def covered(boxes: Sequence[tuple[int, int, int, int]]) -> np.ndarray:
        on = np.zeros((grid, grid), np.bool_)
        for left, top, right, bottom in boxes:
            across = (left <= middles) & (middles < right)
            on |= ((top <= middles) & (middles < bottom))[:, None] & across
        return on.reshape(-1)

    rows, items, places, drawn = [], list[int](), [], []
    for number, scene in enumerate(scenes):
        shown = [item.drawing for item in scene.items]
        for place in sorted({shown.index(drawing) for drawing in shown}):
            on = covered([i.box for i in scene.items if i.drawing == shown[place]])
            if on.any():
                rows.append(number)
                items.append(place)
                places.append(on)
                drawn.append(covered([item.box for item in scene.items]))
    return Targets(np.array(rows), items, np.stack(places), np.stack(drawn))


def _pointing(
    model: Encoder,
    patches: Float[np.ndarray, "scenes patches dim"],
    grid: int,
    scenes: Sequence[Scene],
    language: str,
    batch: int,
    stem: str,
) -> dict[str, float]:
    """Share of names whose most similar patch lies on the drawing; ties count against it."""
    asked = targets(scenes, grid)
    names = [scenes[s].names[language][i] for s, i in zip(asked.scene, asked.item, strict=True)]
    texts = text_features(model, names, batch)
    scores = np.einsum("rpd,rd->rp", patches[asked.scene], texts)
    first = metrics_lib.first_right(scores, asked.on)
    return _spread(f"{stem}/pointing", metrics_lib.hits(first, 1))
