# SPDX-License-Identifier: Apache-2.0
"""The release's training transform: its distribution, its strengths, and that it is an option."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps

from m2jax import config
from m2jax.config import UserError
from m2jax.data import m2_transform
from m2jax.data.image import Preprocess
from m2jax.data.m2_transform import OPERATIONS, crop, train_square
from m2jax.data.tsv import TsvPairs
from tests.data import own_files


@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 2**32))
def test_crops_lie_inside_and_keep_their_area(width, height, seed):
    left, top, right, bottom = crop(width, height, np.random.default_rng(seed))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    area = (right - left) * (bottom - top) / (width * height)
    if min(width, height) > 50 and 0.8 < width / height < 1.25:
        assert 0.78 < area <= 1.0
    if width == height > 50:
        assert 0.74 < (right - left) / (bottom - top) < 1.35


def test_crops_spread_over_their_range():
    rng = np.random.default_rng(0)
    boxes = np.array([crop(300, 300, rng) for _ in range(500)])
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / 300**2
    assert area.min() < 0.82 < 0.96 < area.max()
    assert abs(area.mean() - 0.88) < 0.03  # below 0.9: tall and wide large crops do not fit
    assert len({tuple(box) for box in boxes}) > 480


def noise(side=32):
    values = np.random.default_rng(3).integers(0, 256, (side, side, 3), np.uint8)
    return Image.fromarray(values)


def changed(name, seed):
    return OPERATIONS[name](noise(), np.random.default_rng(seed))


def test_there_are_ten_changes_of_strength_seven():
    assert len(OPERATIONS) == 10
    same = np.asarray(noise())
    np.testing.assert_array_equal(np.asarray(changed("identity", 0)), same)
    exact = {
        "autocontrast": ImageOps.autocontrast(noise()),
        "equalize": ImageOps.equalize(noise()),
        "brightness": ImageEnhance.Brightness(noise()).enhance(1.36),
        "sharpness": ImageEnhance.Sharpness(noise()).enhance(1.36),
    }
    for name, expected in exact.items():
        np.testing.assert_array_equal(np.asarray(changed(name, 0)), np.asarray(expected))
    for name, axis in (("translate_x", 1), ("translate_y", 0)):
        moves = {int(np.sign(seed_of)): 0 for seed_of in (-1, 1)}
        for seed in range(20):
            found = np.asarray(changed(name, seed))
            for move in (-7, 7):
                inside = np.roll(same, -move, axis=axis)
                keep = slice(0, 25) if move > 0 else slice(7, 32)
                index = (keep, slice(None)) if axis == 0 else (slice(None), keep)
                if (found[index] == inside[index]).all():
                    moves[int(np.sign(move))] += 1
        assert sum(moves.values()) == 20
        assert min(moves.values()) > 2
    turned = {np.asarray(changed("rotate", seed)).tobytes() for seed in range(20)}
    wanted = {
        np.asarray(noise().rotate(d, Image.Resampling.BILINEAR, fillcolor=(128,) * 3)).tobytes()
        for d in (21, -21)
    }
    assert turned == wanted


@pytest.mark.parametrize(("name", "axis"), [("shear_x", 0), ("shear_y", 1)])
def test_shears_move_lines_by_a_fifth_of_their_place(name, axis):
    """0.7 x 0.3 pixels per line: of a flat picture, a triangle of grey comes in."""
    white = Image.new("RGB", (100, 100), "white")
    shares = set()
    for seed in range(10):
        found = np.asarray(OPERATIONS[name](white, np.random.default_rng(seed)))
        grey = (found != 255).any(axis=-1)
        shares.add(round(float(grey.mean()), 2))
        per_line = grey.sum(axis=1 - axis)
        assert per_line[-1] == pytest.approx(0.21 * 99, abs=2)
        assert per_line[0] <= 1
    assert shares <= {0.1, 0.11}


def test_each_place_has_its_own_changes_and_no_others():
    image = noise(64)
    preprocess = Preprocess(32)
    one = [np.asarray(train_square(image, preprocess, np.random.default_rng(n))) for n in range(40)]
    two = [np.asarray(train_square(image, preprocess, np.random.default_rng(n))) for n in range(40)]
    np.testing.assert_array_equal(one, two)
    assert len({o.tobytes() for o in one}) == 40
    assert {o.shape for o in one} == {(32, 32, 3)}


def test_mirror_images_are_half():
    """A picture dark on the left: the mean of the halves tells."""
    ramp = Image.fromarray(np.tile(np.arange(0, 200, dtype=np.uint8), (200, 1)))
    flipped = 0
    for seed in range(300):
        pixels = np.asarray(train_square(ramp, Preprocess(32), np.random.default_rng(seed)), float)
        flipped += pixels[8:24, 8:16].mean() > pixels[8:24, 16:24].mean()
    assert 110 < flipped < 190


def test_it_is_an_option_of_the_data(tmp_path):
    tsv = own_files.write_tsv(tmp_path, 8)
    plain = own_files.batches({"own": TsvPairs(tsv)})
    cfg = config.Data(batch_size=8, transform="m2")
    with_it = own_files.batches({"own": TsvPairs(tsv)}, cfg)
    one, two = (s.batch(0, slice(0, 8)) for s in (plain, with_it))
    np.testing.assert_array_equal(one["text"], two["text"])
    assert (one["image"] != two["image"]).any()
    np.testing.assert_array_equal(with_it.batch(0, slice(3, 6))["image"], two["image"][3:6])
    assert (with_it.batch(1, slice(0, 8))["image"][0] != two["image"][0]).any()
    with pytest.raises(
        UserError, match=r"data\.transform='m3': no such transform: one of none, m2"
    ):
        own_files.batches({"own": TsvPairs(tsv)}, config.Data(transform="m3"))
    assert m2_transform.TRANSFORMS[0] == config.Data().transform
