# SPDX-License-Identifier: Apache-2.0
"""Retrieval between pictures and captions, several per picture, in the published protocols.

A table can be had in three ways from the same features, and papers rarely say which:

- ``standard``: a caption belongs to its own picture alone (Karpathy and Fei-Fei 2015; also
  CLIP_benchmark's). Two pictures with the same caption compete for it.
- ``m2_release``: as the M2 release's script counts. Captions are lower-cased and looked up by their
  text: of captions that repeat only the last row counts for pictures, earlier ones always miss; a
  caption belongs to every picture that bears it.
- ``one_caption``: the longest caption of each picture alone. The release's English Flickr30K file
  has one long caption per picture where the usual test has five, which makes text-to-image easier
  and image-to-text harder: compare like with like. Left out where pictures have one caption anyway.

The matrix of scores is never held: features stay on the device and scores are made tile by tile.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from m2jax.config import UserError
from m2jax.eval import figures
from m2jax.eval.figures import Figure

KS = (1, 5, 10)
TILE = 4096  # queries and items of one tile of scores: 64 MB


class Answers(NamedTuple):
    """Which items are right for each query; a query may have none."""

    of_image: Sequence[Sequence[int]]  # rows of captions
    of_text: Sequence[Sequence[int]]  # rows of images


def standard(captions: Sequence[Sequence[str]]) -> Answers:
    """Own captions, own picture."""
    ends = np.cumsum([0, *map(len, captions)])
    of_image = [list(range(a, b)) for a, b in itertools.pairwise(ends)]
    return Answers(of_image, [[i] for i, rows in enumerate(of_image) for _ in rows])


def release_text(text: str) -> str:
    """A caption as the release's script hands it to the model."""
    return text.lower().replace("“", '"').replace("”", '"')


def m2_release(captions: Sequence[Sequence[str]]) -> Answers:
    """By text, as the release's script: see the module's words."""
    texts = [release_text(text) for each in captions for text in each]
    last = {text: row for row, text in enumerate(texts)}
    bearers: dict[str, list[int]] = {}
    for image, each in enumerate(captions):
        for text in each:
            bearers.setdefault(release_text(text), []).append(image)
    of_image = [sorted({last[release_text(text)] for text in each}) for each in captions]
    return Answers(of_image, [sorted(set(bearers[text])) for text in texts])


def longest(captions: Sequence[Sequence[str]]) -> list[int]:
    """The row of each picture's longest caption (the first of equals), by words or characters."""
    rows, start = [], 0
    for each in captions:
        lengths = [(len(text.split()), len(text)) for text in each]
        rows.append(start + lengths.index(max(lengths)))
        start += len(each)
    return rows


def score(
    images: Float[np.ndarray, "images dim"],
    texts: Float[np.ndarray, "texts dim"],
    answers: Answers,
    *,
    tile: int = TILE,
) -> dict[str, Figure]:
    """Recall at 1, 5 and 10 in both directions and their mean, with intervals.

    Text-to-image intervals draw pictures with all their captions, which are not independent of each
    other. Ks past the number of items are left out.

    Args:
        images: unit rows.
        texts: unit rows, picture by picture.
        answers: what counts as right.
        tile: queries and items at once.

    Raises:
        UserError: a feature is not a number, or there are no more items than the first k.
    """
    i2t = ranks(images, texts, answers.of_image, tile=tile)
    t2i = ranks(texts, images, answers.of_text, tile=tile)
    ks = [k for k in KS if k < min(len(images), len(texts))]
    if not ks:
        raise UserError("retrieval: one picture or caption alone cannot be ranked: give more")
    owner = np.concatenate([np.full(len(r), i) for i, r in enumerate(_rows(answers, len(texts)))])
    found, columns = {}, []
    for k in ks:
        examples = np.stack([i2t < k, np.ones(len(images))], axis=-1).astype(np.float32)
        columns.append(examples)
        found[f"i2t_r{k}"] = figures.share(i2t < k)
    for k in ks:
        right = np.bincount(owner, t2i < k, len(images))
        examples = np.stack([right, np.bincount(owner, minlength=len(images))], axis=-1)
        columns.append(examples.astype(np.float32))
        found[f"t2i_r{k}"] = figures.ratios(columns[-1][:, None])
    found["mean_recall"] = figures.ratios(np.stack(columns, axis=1))
    return found


def _rows(answers: Answers, texts: int) -> list[list[int]]:
    """Captions by the picture that they are listed under, which is the first that bears them."""
    rows: list[list[int]] = [[] for _ in answers.of_image]
    for text in range(texts):
        rows[answers.of_text[text][0]].append(text)
    return rows


def ranks(
    queries: Float[np.ndarray, "queries dim"],
    items: Float[np.ndarray, "items dim"],
    right: Sequence[Sequence[int]],
    *,
    tile: int = TILE,
) -> Int[np.ndarray, " queries"]:
    """Rank (from 0) of the best right item of each query; the number of items where none is right.

    Ties count against the query, as in ``metrics.first_right``. Memory on the device: the items and
    a tile of scores. Each tile is made twice, to find the best right score and to count what stands
    before it, so that both see the same bits.

    Raises:
        UserError: a feature is not a number.
    """
    if not (np.isfinite(queries).all() and np.isfinite(items).all()):
        raise UserError("evaluation: a feature is not a number: the model is broken")
    tile_items = min(tile, len(items))
    padded = -len(items) % tile_items
    held = jnp.asarray(np.pad(items, ((0, padded), (0, 0))), jnp.float32)
    held = held.reshape(-1, tile_items, items.shape[1])
    widest = max(map(len, right), default=0)
    size = min(tile, len(queries))
    found = np.empty(len(queries), np.int64)
    for first in range(0, len(queries), size):
        rows = slice(first, min(first + size, len(queries)))
        count = rows.stop - rows.start
        wanted = np.full((size, max(widest, 1)), -1, np.int32)
        for row, each in enumerate(right[rows]):
            wanted[row, : len(each)] = each
        part = np.pad(queries[rows], ((0, size - count), (0, 0))).astype(np.float32)
        found[rows] = np.asarray(_tiles(jnp.asarray(part), held, wanted, len(items)))[:count]
    return found


@functools.partial(jax.jit, static_argnums=3)
def _tiles(
    queries: Float[Array, "queries dim"],
    items: Float[Array, "tiles tile dim"],
    right: Int[Array, "queries most"],
    total: int,
) -> Int[Array, " queries"]:
    """Ranks of some queries, over the items tile by tile."""
    size = items.shape[1]
    starts = jnp.arange(len(items)) * size

    def scores(tile: Array) -> Array:
        return jnp.matmul(queries, tile.T, precision="highest")

    def gathered(table: Array, start: Array) -> Array:
        """Scores of the right items that lie in this tile; -inf for the others."""
        place = right - start
        here = (right >= 0) & (place >= 0) & (place < size)
        taken = jnp.take_along_axis(table, jnp.clip(place, 0, size - 1), axis=1)
        return jnp.where(here, taken, -jnp.inf)

    def best(so_far: Array, tile: tuple[Array, Array]) -> tuple[Array, None]:
        return jnp.maximum(so_far, gathered(scores(tile[0]), tile[1]).max(axis=1)), None

    none = jnp.full(len(queries), -jnp.inf)
    top, _ = jax.lax.scan(best, none, (items, starts))

    def before(so_far: Array, tile: tuple[Array, Array]) -> tuple[Array, None]:
        table = scores(tile[0])
        real = tile[1] + jnp.arange(size) < total
        ahead = ((table >= top[:, None]) & real).sum(axis=1)
        own = (gathered(table, tile[1]) >= top[:, None]).sum(axis=1)
        return so_far + ahead - jnp.where(jnp.isfinite(top), own, 0), None

    count, _ = jax.lax.scan(before, jnp.zeros(len(queries), jnp.int32), (items, starts))
    return jnp.where(jnp.isfinite(top), count, total)
