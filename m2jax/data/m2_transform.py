# SPDX-License-Identifier: Apache-2.0
"""The M2 release's changes to training images, made by PIL on the host.

Its transform (``vlmo/transforms/square_transform.py`` and ``randaugment.py``) is a random crop of
0.8 to 1 of the area resized with bicubic weights, a mirror image one time in two, and
RandAugment(2, 7) of the ten changes below, a form it has from ALBEF: two changes drawn with
replacement, each made one time in two, strength 7 on a scale of 10, what is uncovered filled with
mid-grey. It moves and sharpens by OpenCV; here PIL does, at the same strengths. A mirror image
turns "left of" in a caption into a lie: for captions of positions leave this off.

The device-side changes of ``data.augment`` are another matter and may come on top.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from m2jax.data.image import Preprocess

TRANSFORMS = ("none", "m2")
AREA = (0.8, 1.0)  # of the image that the crop keeps
ASPECT = (3 / 4, 4 / 3)  # of the crop, relative to nothing: width by height
TRIES = 10  # crops drawn before the whole image is taken
CHANGES, LEVEL, LEVELS = 2, 7, 10
CHANCE = 0.5  # of each drawn change
GREY = (128, 128, 128)

Rng = np.random.Generator
Change = Callable[[Image.Image, Rng], Image.Image]


def train_square(image: Image.Image, preprocess: Preprocess, rng: Rng) -> Image.Image:
    """One image as the RGB square that training sees.

    Args:
        image: decoded.
        preprocess: the model's, for the size and what becomes of transparency.
        rng: of this place in the training order.
    """
    box = crop(image.width, image.height, rng)
    rgb = preprocess.rgb(image).resize(
        (preprocess.size, preprocess.size), Image.Resampling.BICUBIC, box=box
    )
    if rng.random() < 0.5:
        rgb = rgb.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for name in rng.choice(list(OPERATIONS), CHANGES):
        if rng.random() < CHANCE:
            rgb = OPERATIONS[str(name)](rgb, rng)
    return rgb


def crop(width: int, height: int, rng: Rng) -> tuple[int, int, int, int]:
    """A box of random area and aspect ratio: left, top, right, bottom (torchvision's rule)."""
    for _ in range(TRIES):
        area = width * height * rng.uniform(*AREA)
        ratio = math.exp(rng.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    # The whole image, or the middle of one that is longer than any crop may be.
    ratio = min(max(width / height, ASPECT[0]), ASPECT[1])
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _either(value: float, rng: Rng) -> float:
    """The value or its negative."""
    return value if rng.random() < 0.5 else -value


def _enhanced(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Change:
    """Brightness or sharpness: 0.1 to 1.9 over the scale, 1 leaves the image as it is."""
    return lambda image, rng: kind(image).enhance(LEVEL / LEVELS * 1.8 + 0.1)


def _moved(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    """The image through the inverse affine map of PIL, bilinearly."""
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=GREY
    )


def _shear_x(image: Image.Image, rng: Rng) -> Image.Image:
    return _moved(image, (1, _either(LEVEL / LEVELS * 0.3, rng), 0, 0, 1, 0))


def _shear_y(image: Image.Image, rng: Rng) -> Image.Image:
    return _moved(image, (1, 0, 0, _either(LEVEL / LEVELS * 0.3, rng), 1, 0))


def _translate_x(image: Image.Image, rng: Rng) -> Image.Image:
    """By 7 pixels, whatever the size."""
    return _moved(image, (1, 0, _either(LEVEL / LEVELS * 10, rng), 0, 1, 0))


def _translate_y(image: Image.Image, rng: Rng) -> Image.Image:
    return _moved(image, (1, 0, 0, 0, 1, _either(LEVEL / LEVELS * 10, rng)))


def _rotate(image: Image.Image, rng: Rng) -> Image.Image:
    """By 21 degrees about the middle."""
    degrees = _either(LEVEL / LEVELS * 30, rng)
    return image.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=GREY)


OPERATIONS: dict[str, Change] = {
    "identity": lambda image, rng: image,
    "autocontrast": lambda image, rng: ImageOps.autocontrast(image),
    "equalize": lambda image, rng: ImageOps.equalize(image),
    "brightness": _enhanced(ImageEnhance.Brightness),
    "sharpness": _enhanced(ImageEnhance.Sharpness),
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
    "rotate": _rotate,
}
