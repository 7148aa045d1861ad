# SPDX-License-Identifier: Apache-2.0
"""Features of whole data sets: images are read while the batch before them is encoded."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Float32, Int
from PIL import Image

from m2jax.config import UserError
from m2jax.eval.emoji import Encoder, text_features
from m2jax.eval.sets.records import Images

READERS = min(16, os.cpu_count() or 1)  # threads: decoding and resizing leave Python's lock

Views = Callable[[Image.Image], Iterable[Image.Image]]


def image_features(
    model: Encoder,
    images: Images,
    *,
    batch: int,
    show: bool = False,
    views: Views = lambda image: [image],
) -> Float32[np.ndarray, "rows dim"]:
    """Features of every image, in order; at most two batches of pixels are in memory.

    Args:
        model: whose preprocessing and encoder are used.
        images: the pictures.
        batch: pictures at once.
        show: say on the terminal how far it is.
        views: what is encoded of a picture, as many of each; they follow one another in the rows.
            A picture is decoded once for all of them.

    Raises:
        UserError: an image cannot be read, or a feature is not a number.
    """
    parts = []
    done = 0
    size = min(batch, len(images))
    for pixels, count in _batches(model, images, size, views):
        rows = len(pixels) // size * count
        parts.append(np.asarray(model.encode_image(pixels), np.float32)[:rows])
        done += count
        if show:
            print(f"\r{done}/{len(images)} images", end="", file=sys.stderr, flush=True)
    if show:
        print(file=sys.stderr)
    return _checked(np.concatenate(parts), "images")


def unique_text_features(
    model: Encoder, texts: Sequence[str], *, batch: int
) -> tuple[Float32[np.ndarray, "unique dim"], Int[np.ndarray, " texts"]]:
    """Features of the distinct texts, and for each text its row among them."""
    places: dict[str, int] = {}
    rows = np.array([places.setdefault(text, len(places)) for text in texts])
    features = np.asarray(text_features(model, list(places), batch), np.float32)
    return _checked(features, "texts"), rows


def _batches(
    model: Encoder, images: Images, size: int, views: Views
) -> Iterator[tuple[np.ndarray, int]]:
    """Pixels of equal batches, so one shape is compiled, and how many images of each count."""

    def pixels(row: int) -> np.ndarray:
        return np.asarray(model.preprocess(list(views(images.read(row)))))

    starts = range(0, len(images), size)
    with ThreadPoolExecutor(READERS) as pool:
        ahead = [pool.submit(pixels, row) for row in range(min(size, len(images)))]
        for start in starts:
            stop = min(start + size, len(images))
            batch = [future.result() for future in ahead]
            ahead = [pool.submit(pixels, row) for row in range(stop, min(stop + size, len(images)))]
            count = len(batch)
            yield np.concatenate(batch + batch[-1:] * (size - count)), count


def _checked(features: np.ndarray, what: str) -> np.ndarray:
    if not np.isfinite(features).all():
        raise UserError(f"evaluation: features of {what} are not numbers: the model is broken")
    return features
