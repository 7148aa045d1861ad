# SPDX-License-Identifier: Apache-2.0
"""Image files to the pixels an encoder takes. Files are hostile until they are decoded."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32
from PIL import Image

from m2jax.config import UserError

PIXEL_LIMIT = 64 * 2**20  # of one image; a decompression bomb has more


@dataclass(frozen=True)
class Preprocess:
    """Straight resize to a square, as the M2 release does it (spec section 9): PIL bicubic.

    ``background="drop"`` ignores transparency like ``convert("RGB")``; ``"white"`` puts drawings on
    white first, which is how the emoji set is meant to be seen.
    """

    size: int
    background: Literal["drop", "white"] = "drop"

    def __call__(self, images: Sequence[Image.Image]) -> Float32[np.ndarray, "batch size size 3"]:
        """Pixels in [0, 1]; the first frame of an animation, 16-bit scaled down by PIL."""
        batch = np.empty((len(images), self.size, self.size, 3), np.float32)
        for row, image in enumerate(images):
            rgb = self._rgb(image).resize((self.size, self.size), Image.Resampling.BICUBIC)
            batch[row] = np.asarray(rgb, np.float32) / 255
        return batch

    def _rgb(self, image: Image.Image) -> Image.Image:
        if self.background == "drop" or not image.has_transparency_data:
            return image.convert("RGB")
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps; ``Preprocess(**saved)`` is the inverse."""
        return asdict(self)


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """Opens and fully decodes an image file.

    Raises:
        UserError: missing, no image, truncated, or too large to be honest.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.width * image.height > PIXEL_LIMIT:
                    raise UserError(
                        f"{path}: {image.width} x {image.height} pixels: over the limit of "
                        f"{PIXEL_LIMIT:,}: scale it down first"
                    )
                image.load()
                return image.copy()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: unreadable image ({error}): replace or leave it out") from error
