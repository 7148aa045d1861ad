# SPDX-License-Identifier: Apache-2.0
"""A folder of pictures searched by words or by a picture, by one model or two: what the page shows.

Knows nothing of the page (``explore_page``). Uploaded files are opened as every file from outside:
decoded whole, within limits, or refused.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32
from PIL import Image

from m2jax.bundle import Bundle
from m2jax.config import UserError
from m2jax.data.image import open_image
from m2jax.eval import features, prompts, zero_shot
from m2jax.eval.sets import records
from m2jax.eval.sets.folders import SUFFIXES
from m2jax.eval.sets.records import Files

QUERY_LETTERS = 1000  # of a query or a list of labels
MOST_LABELS = 100
MOST_SHOWN = 100
THUMBNAIL = 320  # pixels of the longer side


class Side(NamedTuple):
    """One model and what it makes of the pictures."""

    name: str
    model: Bundle
    features: Float32[np.ndarray, "pictures dim"]


class Found(NamedTuple):
    """A picture and its cosine with what was asked for."""

    picture: int
    score: float


@dataclass(frozen=True)
class Gallery:
    """Pictures that can be decoded, as one or two models see them."""

    root: Path
    pictures: Files
    sides: Sequence[Side]

    def by_text(self, side: int, query: str, count: int) -> list[Found]:
        """The pictures nearest to some words.

        Raises:
            UserError: no words, or far too many.
        """
        query = _short(query, "query")
        feature, _ = features.unique_text_features(self.sides[side].model, [query], batch=1)
        return self._nearest(side, feature[0], count)

    def by_picture(self, side: int, image: Image.Image, count: int) -> list[Found]:
        """The pictures nearest to a picture."""
        return self._nearest(side, self._feature(side, image), count)

    def label(self, side: int, image: Image.Image, labels: Sequence[str]) -> dict[str, float]:
        """Probabilities of labels for a picture, from the model's own scale, by prompt ensembles.

        Raises:
            UserError: fewer than two labels, or far too many.
        """
        model = self.sides[side].model
        weights = np.concatenate(
            [
                zero_shot.classifier(
                    model, [(name,)], prompts.TEMPLATES[records.language_of([name])], batch=64
                )
                for name in labels
            ]
        )
        logits = np.asarray(model.logits(self._feature(side, image)[None], weights))[0]  # pyright: ignore[reportArgumentType]
        shares = np.exp(logits - logits.max())
        return dict(zip(labels, (shares / shares.sum()).tolist(), strict=True))

    def thumbnail(self, picture: int) -> Image.Image:
        """A small copy of a picture, so that no file of the folder is ever served."""
        image = self.pictures.read(picture).convert("RGB")
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        return image

    def name(self, picture: int) -> str:
        """The path of a picture below the folder."""
        return self.pictures.paths[picture].relative_to(self.root).as_posix()

    def _feature(self, side: int, image: Image.Image) -> np.ndarray:
        model = self.sides[side].model
        return np.asarray(model.encode_image(model.preprocess([image])), np.float32)[0]

    def _nearest(self, side: int, feature: np.ndarray, count: int) -> list[Found]:
        scores = self.sides[side].features @ feature
        order = np.argsort(-scores, kind="stable")[: max(1, min(count, MOST_SHOWN))]
        return [Found(int(row), float(scores[row])) for row in order]


def split_labels(text: str) -> list[str]:
    """Labels typed into one field: one per line, or between commas of either language.

    Raises:
        UserError: fewer than two, or far too many.
    """
    text = _short(text, "labels").replace("，", ",").replace("、", ",").replace("\n", ",")
    labels = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not 2 <= len(labels) <= MOST_LABELS:
        raise UserError(f"labels: {len(labels)}: write 2 to {MOST_LABELS}, between commas")
    return labels


def gather(folder: Path, models: Sequence[tuple[str, Bundle]], *, batch: int = 64) -> Gallery:
    """Reads a folder and encodes what is in it; files that are no pictures are left out by name.

    Raises:
        UserError: there is no such folder, or no picture in it.
    """
    if not folder.is_dir():
        raise UserError(f"--images {folder}: no such folder: check the path")
    paths, skipped = list[Path](), list[str]()
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES):
        try:
            open_image(path)
            paths.append(path)
        except UserError as error:
            skipped.append(str(error))
    for reason in skipped[:5]:
        print(f"left out: {reason}", file=sys.stderr)
    if len(skipped) > 5:
        print(f"left out: {len(skipped) - 5} more", file=sys.stderr)
    if not paths:
        raise UserError(f"--images {folder}: holds no picture: name a folder with images")
    pictures = Files(paths)
    sides = [
        Side(name, model, features.image_features(model, pictures, batch=batch, show=True))
        for name, model in models
    ]
    return Gallery(folder, pictures, sides)


def _short(text: str, what: str) -> str:
    text = (text or "").strip()
    if not text:
        raise UserError(f"{what}: empty: type some words")
    if len(text) > QUERY_LETTERS:
        raise UserError(f"{what}: {len(text):,} letters: write at most {QUERY_LETTERS:,}")
    return text
