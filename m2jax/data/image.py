# SPDX-License-Identifier: Apache-2.0
"""Image files to the pixels an encoder takes. Files are hostile until they are decoded."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import IO, Any, Literal, get_args, get_type_hints

import numpy as np
from jaxtyping import Float32
from PIL import Image

from m2jax.config import UserError

Resample = Literal["nearest", "lanczos", "bilinear", "bicubic"]

PIXEL_LIMIT = 64 * 2**20  # of one image; a decompression bomb has more


@dataclass(frozen=True)
class Preprocess:
    """PIL images to the square an encoder takes, by PIL's own resampling.

    Without ``shortest`` the image is resized straight to the square, as the M2 release (spec
    section 9), SigLIP and Chinese-CLIP do it. With it, the shorter side is resized to that many
    pixels, the longer one in proportion (rounded down), and the centre is cut out: CLIP.

    ``background="drop"`` ignores transparency like ``convert("RGB")``; ``"white"`` puts drawings on
    white first, which is how the emoji set is meant to be seen.
    """

    size: int
    background: Literal["drop", "white"] = "drop"
    resample: Resample = "bicubic"
    shortest: int = 0  # pixels of the shorter side before the centre is cut out; 0: no cutting
    cut: Literal["floor", "even"] = "floor"  # of half an odd margin: transformers' | torchvision's

    def __post_init__(self) -> None:
        if self.shortest and self.shortest < self.size:
            raise UserError(
                f"preprocessing: shorter side {self.shortest} below the square {self.size}: "
                "mend the release's preprocessing file"
            )

    def __call__(self, images: Sequence[Image.Image]) -> Float32[np.ndarray, "batch size size 3"]:
        """Pixels in [0, 1]; the first frame of an animation, 16-bit scaled down by PIL."""
        batch = np.empty((len(images), self.size, self.size, 3), np.float32)
        for row, image in enumerate(images):
            batch[row] = np.asarray(self.square(image), np.float32) / 255
        return batch

    def square(self, image: Image.Image) -> Image.Image:
        """One image as the RGB square whose values [0, 255] ``__call__`` scales to [0, 1]."""
        rgb = self.rgb(image)
        resample = Image.Resampling[self.resample.upper()]
        if not self.shortest:
            return rgb.resize((self.size, self.size), resample)
        short = min(rgb.size)
        width, height = (int(self.shortest * side / short) for side in rgb.size)
        left, top = self._margin(width), self._margin(height)
        kept = (left, top, left + self.size, top + self.size)
        if width * height <= PIXEL_LIMIT:
            return rgb.resize((width, height), resample).crop(kept)
        # A strip of 1 x 1,000,000 would grow to billions of pixels: resample what is kept alone,
        # the same but for rounding.
        across, down = rgb.width / width, rgb.height / height
        box = (kept[0] * across, kept[1] * down, kept[2] * across, kept[3] * down)
        return rgb.resize((self.size, self.size), resample, box=box)

    def _margin(self, side: int) -> int:
        """Pixels cut off before the centre."""
        odd_half = (side - self.size) / 2
        return math.floor(odd_half) if self.cut == "floor" else round(odd_half)

    def rgb(self, image: Image.Image) -> Image.Image:
        """The image in RGB, transparency dropped or on white."""
        if self.background == "drop" or not image.has_transparency_data:
            return image if image.mode == "RGB" else image.convert("RGB")  # which would copy
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: Any, size: int) -> Preprocess:
        """Inverse of ``to_dict``, for a model that takes ``size`` pixels.

        Raises:
            UserError: another size, an unknown key, or a value out of its choices.
        """
        wrong = UserError(
            f"preprocessing: {saved!r:.200} is none of a model of {size} pixels: "
            "use the files of one model"
        )
        if not isinstance(saved, dict) or saved.get("size") != size:
            raise wrong
        choices = {k: get_args(v) for k, v in get_type_hints(cls).items() if get_args(v)}
        for key, value in saved.items():
            if key in choices:
                fits = value in choices[key]
            else:
                fits = key in ("size", "shortest") and type(value) is int
                fits = fits and 0 <= value <= 16 * size
            if not fits:
                raise wrong
        return cls(**saved)


def open_image(
    file: str | os.PathLike[str] | IO[bytes], name: str = "", *, at_least: int = 0
) -> Image.Image:
    """Opens and fully decodes an image file.

    Args:
        file: its path, or the open file.
        name: what errors call it; the path if not given.
        at_least: a JPEG may be decoded at a half, a quarter or an eighth of its size, which is
            faster and not the same to the last bit, if no side gets shorter than this; 0: it may
            not.

    Raises:
        UserError: missing, no image, truncated, or too large to be honest.
    """
    where = name or file
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                if image.width * image.height > PIXEL_LIMIT:
                    raise UserError(
                        f"{where}: {image.width} x {image.height} pixels: over the limit of "
                        f"{PIXEL_LIMIT:,}: scale it down first"
                    )
                if at_least:
                    image.draft("RGB", (at_least, at_least))
                image.load()
                return image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{where}: unreadable image ({error}): replace or leave it out") from error
