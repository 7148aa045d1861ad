# SPDX-License-Identifier: Apache-2.0
"""From what a detector sees to segments: of whole, long, cut and pooled maps, and of keyframes."""

import numpy as np
import pytest

from m2jax.config import UserError
from m2jax.tasks.video import align, keyframes, pattern, ssan

SIZE = 64


@pytest.fixture(scope="module")
def part():
    settings = ssan.Settings(size=SIZE, width=4, steps=1, batch=1, simulated=1.0)
    return ssan.train(None, settings, dim=8)


class Oracle(pattern.Spd):
    """Sees exactly the box around what is not 0 in each square; finds nothing in an empty one."""

    def _look(self, squares):
        for square in squares:
            rows, columns = (np.flatnonzero(square.max(axis=a) > 0.3) for a in (1, 0))
            if not len(rows):
                yield np.zeros((0, 6))
                continue
            ends = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
            x0, y0, x1, y1 = map(float, ends)
            yield np.array([[(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0, 0.9, 1.0]])


def diagonal(shape, q, r, count):
    values = np.zeros(shape, np.float32)
    for beside in (-2, -1, 1, 2):  # patches with one similarity a frame are not looked at
        values[q + np.arange(count), np.clip(r + beside + np.arange(count), 0, shape[1] - 1)] = 0.1
    values[q + np.arange(count), r + np.arange(count)] = 1
    return values


@pytest.mark.parametrize(
    ("shape", "box"),
    [
        ((60, 64), (10, 20, 40, 50)),
        ((32, 30), (4, 2, 24, 22)),  # shown at twice its size
        ((200, 150), (30, 40, 120, 130)),  # pooled by 4
        ((20, 90), (5, 32, 18, 45)),  # in patches, within the second
        ((90, 20), (62, 3, 76, 17)),
    ],
)
def test_what_is_seen_is_found_where_it_is(part, shape, box):
    q0, r0, q1, _ = box
    (found,) = Oracle(part).spans([diagonal(shape, q0, r0, q1 - q0)])
    # To a pixel and a half of the square, or a pooled block.
    block = -(-min(max(shape), 3 * min(shape)) // SIZE)
    np.testing.assert_allclose(found, [box], atol=2.5 * block)
    (whole,) = align.align(Oracle(part), [diagonal(shape, q0, r0, q1 - q0)], end_exclusive=True)
    assert whole.dtype == np.int64
    np.testing.assert_array_equal(whole, np.round(found))
    (inclusive,) = align.align(Oracle(part), [diagonal(shape, q0, r0, q1 - q0)])
    np.testing.assert_array_equal(inclusive, whole - [0, 0, 1, 1])


@pytest.mark.parametrize("across", [False, True])
def test_a_segment_over_two_patches_is_one(part, across):
    values = diagonal((30, 200), 3, 78, 24)  # patches end at 90 and 180
    box = [3, 78, 27, 102]
    if across:
        values, box = values.T, [78, 3, 102, 27]
    (found,) = Oracle(part).spans([values])
    np.testing.assert_allclose(found, [box], atol=3)


def test_two_segments_at_a_border_stay_two(part):
    early = diagonal((30, 200), 18, 80, 10)  # ends at 90, frame 28
    values = np.maximum(early, diagonal((30, 200), 2, 90, 10))  # begins there, at frame 2
    (found,) = Oracle(part).spans([values])
    assert len(found) == 2


def test_boxes_end_with_the_map(part):
    class Wide(Oracle):
        def _look(self, squares):
            for _ in squares:
                yield np.array([[SIZE / 2, SIZE / 2, 3 * SIZE, 3 * SIZE, 0.9, 1.0]])

    values = np.ones((10, 75), np.float32)  # three patches, the last of 15 frames
    (found,) = Wide(part).spans([values])
    assert found.min() >= 0
    assert (found[:, 2:] <= [10, 75]).all()


def test_maps_without_anything_give_nothing(part):
    found = align.align(pattern.Spd(part), [np.zeros((5, 40)), np.zeros((9, 9)), -np.ones((3, 3))])
    assert [own.shape for own in found] == [(0, 4)] * 3


def test_several_maps_at_once_are_the_same_as_alone(part):
    rng = np.random.default_rng(0)
    maps = [rng.random(shape).astype(np.float32) for shape in ((30, 40), (12, 80), (90, 60))] * 2
    method = pattern.Spd(part, conf=0.005)
    together = method.spans(maps)
    assert sum(map(len, together))
    for one, found in zip(maps, together, strict=True):
        np.testing.assert_allclose(method.spans([one])[0], found, atol=1e-3)


def test_confidence_is_the_networks(part):
    rng = np.random.default_rng(0)
    maps = [rng.random((40, 40)).astype(np.float32)]
    counts = [len(pattern.Spd(part, conf=c, nms=0.9).spans(maps)[0]) for c in (0.001, 0.02, 0.9)]
    assert counts[0] > 0
    assert counts == sorted(counts, reverse=True)
    assert counts[2] == 0


def test_segments_of_keyframes_are_in_frames(part):
    """Every fourth frame of a copy is on the map; the segment is found in frames."""
    rng = np.random.default_rng(0)
    query, reference = (
        (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
        for x in (rng.normal(size=(n, 256)) for n in (120, 160))
    )
    query[40:80] = reference[60:100]
    uniform = pattern.Keyframes(ssan.Part(ssan.Settings(window=4), 0))
    method = align.with_settings("DP", {"discontinue": 1, "min_sim": 1.5, "min_length": 3})
    (found,) = pattern.spans_of_features(method, uniform, [(query, reference)])
    np.testing.assert_allclose(found, [[40, 60, 80, 100]], atol=6)  # DP begins a step early
    kept = uniform(query)
    assert kept.tolist() == keyframes.uniform(120, 4).tolist()


def test_extractors_refuse_other_features():
    settings = ssan.Settings(kind="ske", window=4, steps=1, batch=1, simulated=1.0)
    choose = pattern.Keyframes(ssan.train(None, settings, dim=8))
    for length in (1, 3, 255, 256, 300):
        kept = choose(np.random.default_rng(0).normal(size=(length, 8)))
        assert (kept // 4).tolist() == list(range(-(-length // 4)))
        assert kept[-1] < length
    with pytest.raises(UserError, match="features of 8 numbers, not of 16"):
        choose(np.zeros((10, 16)))


def test_names_and_settings(part):
    method = pattern.chosen("spd", ["conf=0.2", "nms=0.5"], part)
    assert (method.conf, method.nms) == (0.2, 0.5)
    assert pattern.chosen("tn", [], None) == align.BENCHMARK["TN"]
    for words, message in (
        (("spd", [], None), "needs --detector"),
        (("TN", [], part), "--detector: is not used by TN"),
        (("XY", [], None), "use one of HV, TN, DP, DTW, SPD"),
        (("SPD", ["top=3"], part), "use conf=NUMBER or nms=NUMBER"),
        (("SPD", ["conf"], part), "write NAME=NUMBER"),
        (("SPD", ["conf=2"], part), "between 0 and 1"),
    ):
        with pytest.raises(UserError, match=message):
            pattern.chosen(*words)
    ske = ssan.Settings(kind="ske", window=4, steps=1, batch=1, simulated=1.0)
    with pytest.raises(UserError, match="has no detector"):
        pattern.Spd(ssan.train(None, ske, dim=8))
