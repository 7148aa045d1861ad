# SPDX-License-Identifier: Apache-2.0
"""Several views of one image at test: scales, crops and mirror images (test-time augmentation).

The public code resizes to 256/224 of the model's size and cuts out the centre; its lines for five
crops and mirrors are commented out, and the paper's scales are not known. The default here, two
scales with five crops and mirrors, is our choice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from PIL import Image

from m2jax.config import UserError
from m2jax.eval.emoji import Encoder
from m2jax.eval.sets.records import Images
from m2jax.tasks.labels import features

CROPS = ("centre", "five")


@dataclass(frozen=True)
class Views:
    """Which views are taken; one alone is the image as the model's preprocessing makes it."""

    scales: tuple[float, ...] = ()  # the shorter side, in units of the crop; none: the plain view
    crops: str = "centre"
    mirror: bool = False

    def __post_init__(self) -> None:
        if self.crops not in CROPS:
            raise UserError(f"crops={self.crops!r}: use one of {', '.join(CROPS)}")
        if any(not 1 <= scale <= 4 for scale in self.scales):
            raise UserError(f"scales={self.scales}: each must lie between 1 and 4")

    @property
    def count(self) -> int:
        """Views of an image."""
        crops = 5 if self.crops == "five" else 1
        return max(1, len(self.scales) * crops) * (2 if self.mirror else 1)


FULL = Views((1.0, 256 / 224), "five", True)


def views(image: Image.Image, kinds: Views) -> Iterator[Image.Image]:
    """The views of an image, in a fixed order; squares, but for the plain view."""
    plain = [image] if not kinds.scales else []
    crops = (crop for scale in kinds.scales for crop in _crops(image, scale, kinds.crops))
    for view in (*plain, *crops):
        yield view
        if kinds.mirror:
            yield view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def _crops(image: Image.Image, scale: float, crops: str) -> Iterator[Image.Image]:
    """Squares of 1/scale of the shorter side: the centre, and the four corners.

    The preprocessing resizes what was cut: but at the borders that is resizing and then cutting,
    without the large image.
    """
    side = max(1, round(min(image.size) / scale))
    right, down = image.width - side, image.height - side
    places = [(right // 2, down // 2)]
    if crops == "five":
        places += [(0, 0), (right, 0), (0, down), (right, down)]
    for left, top in places:
        yield image.crop((left, top, left + side, top + side))


def view_features(
    model: Encoder, pictures: Images, kinds: Views, *, length: bool, batch: int, show: bool = False
) -> Float[np.ndarray, "images views dim"]:
    """Features of every view of every image; ``batch`` views at once, those of an image at least.

    An image is decoded once for all its views.
    """
    rows = features.images(
        model,
        pictures,
        length=length,
        batch=max(1, batch // kinds.count),
        show=show,
        views=lambda image: views(image, kinds),
    )
    return rows.reshape(len(pictures), kinds.count, -1)


def mean_probabilities(
    probabilities: Sequence[Float[np.ndarray, "images classes"]],
) -> Float[np.ndarray, "images classes"]:
    """Mean over views."""
    return np.mean(np.stack(list(probabilities)), axis=0)
