# SPDX-License-Identifier: Apache-2.0
"""Resizing and cutting as CLIP, SigLIP and Chinese-CLIP do it."""

import numpy as np
import pytest
from PIL import Image

from m2jax.config import UserError
from m2jax.data.image import Preprocess


def picture(width, height):
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def test_the_default_is_the_straight_bicubic_resize():
    image = picture(31, 20)
    straight = image.resize((16, 16), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(Preprocess(16)([image])[0] * 255, np.asarray(straight))
    bilinear = image.resize((16, 16), Image.Resampling.BILINEAR)
    ours = Preprocess(16, resample="bilinear")([image])[0]
    np.testing.assert_array_equal(ours * 255, np.asarray(bilinear))


@pytest.mark.parametrize(
    ("size", "cut", "box"),
    [
        ((40, 20), "floor", (8, 0)),  # 32 x 16 after the resize
        ((44, 20), "floor", (9, 0)),  # 35 x 16: half of 19 is 9.5
        ((44, 20), "even", (10, 0)),  # torchvision rounds halves to even
        ((20, 41), "even", (0, 8)),  # 16 x 32: half of 16
        ((20, 42), "even", (0, 8)),  # 16 x 33: half of 17 is 8.5, to even
    ],
)
def test_the_shorter_side_is_resized_and_the_centre_kept(size, cut, box):
    image = picture(*size)
    short = min(size)
    whole = image.resize(tuple(int(16 * s / short) for s in size), Image.Resampling.BICUBIC)
    left, top = box
    wanted = np.asarray(whole.crop((left, top, left + 16, top + 16)), np.float32)
    np.testing.assert_array_equal(Preprocess(16, shortest=16, cut=cut)([image])[0] * 255, wanted)


def test_a_larger_shorter_side_keeps_less():
    image = picture(24, 24)
    wanted = image.resize((20, 20), Image.Resampling.BICUBIC).crop((2, 2, 18, 18))
    np.testing.assert_array_equal(
        Preprocess(16, shortest=20)([image])[0] * 255, np.asarray(wanted, np.float32)
    )
    with pytest.raises(UserError, match="shorter side 12 below the square 16"):
        Preprocess(16, shortest=12)


def test_a_strip_is_not_blown_up():
    strip = Image.linear_gradient("L").resize((1, 400_000))
    pixels = Preprocess(224, shortest=224)([strip])[0]
    assert pixels.shape == (224, 224, 3)
    np.testing.assert_allclose(pixels, np.full_like(pixels, pixels.mean()), atol=0.05)
    near = Preprocess(16, shortest=16)([picture(7, 16 * 7)])
    assert near.shape == (1, 16, 16, 3)


def test_what_is_saved_comes_back():
    made = Preprocess(16, resample="bilinear", shortest=18, cut="even")
    assert Preprocess(**made.to_dict()) == made
    assert Preprocess(**{"size": 16, "background": "white"}).shortest == 0  # saved by version 0.1
