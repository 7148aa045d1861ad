# SPDX-License-Identifier: Apache-2.0
"""Masks, patches and squares of maps of 10 to 12,590 frames, and boxes back to their segments."""

import numpy as np
import pytest

from m2jax.tasks.video import patches


def test_mask_keeps_the_highest_and_of_equal_ones_the_last(monkeypatch):
    rng = np.random.default_rng(0)
    values = rng.integers(-2, 8, (50, 37)) / 6  # many ties, some below 0 and some above 1
    expected = np.zeros_like(values)
    for row, own in enumerate(np.clip(values, 0, 1)):
        order = sorted(range(37), key=lambda c: (own[c], c))
        for column in order[-5:]:
            expected[row, column] = own[column]
    np.testing.assert_array_equal(patches.mask(values, top=5), expected)
    monkeypatch.setattr(patches, "ROWS", 3 * 37)  # in several goes
    np.testing.assert_array_equal(patches.mask(values, top=5), expected)
    np.testing.assert_array_equal(patches.mask(values, top=37), np.clip(values, 0, 1))


@pytest.mark.parametrize(
    ("shape", "count", "size"),
    [
        ((10, 12590), 420, (10, 30)),
        ((12590, 10), 420, (30, 10)),
        ((10, 30), 1, (10, 30)),  # three times exactly: cut, into one
        ((10, 31), 1, (10, 30)),  # the last column is too little
        ((10, 32), 2, (10, 30)),
        ((10, 29), 1, (10, 29)),
        ((12590, 4200), 1, (12590, 4200)),
        ((12590, 4196), 2, (12588, 4196)),
    ],
)
def test_patches_tile_the_map(shape, count, size):
    values = np.full(shape, 0.5, np.float32)
    found = list(patches.split(values))
    assert len(found) == count
    covered = np.zeros(shape, bool)
    for patch in found:
        assert patch.values.shape == size
        q, r = patch.query, patch.reference
        part = patch.values[: shape[0] - q, : shape[1] - r]
        assert (part == 0.5).all()
        assert not covered[q : q + size[0], r : r + size[1]].any()
        covered[q : q + size[0], r : r + size[1]] = True
        assert np.count_nonzero(patch.values) == part.size
    assert all(np.count_nonzero(p.values) / 10 > 1 for p in found)
    # What is left uncovered is too little to be looked at: at most one similarity a frame.
    assert (~covered).sum() <= min(shape) or (~covered).sum() == 0


def test_patches_with_little_are_left_out():
    values = np.zeros((10, 90), np.float32)
    values[:, 5] = 1  # one each: too little
    values[:, 31] = 1
    values[0, 59] = 1  # one more in the second
    assert [p.reference for p in patches.split(values)] == [30]
    assert list(patches.split(np.zeros((10, 20)))) == []


def test_pooling_keeps_diagonals():
    values = np.zeros((1000, 700), np.float32)
    values[np.arange(700), np.arange(700)] = 0.9
    small, block = patches.pool(values, 160)
    assert block == 7
    assert small.shape == (143, 100)
    assert (small[np.arange(100), np.arange(100)] == 0.9).all()
    same, one = patches.pool(values[:160, :160], 160)
    assert one == 1
    assert same.shape == (160, 160)


@pytest.mark.parametrize("shape", [(40, 40), (57, 31), (128, 90), (5, 9), (300, 640)])
def test_letterbox_centres_the_patch(shape):
    size = 128
    square = patches.letterbox(np.ones(shape, np.float32), size)
    where = patches.fit(*shape, size)
    rows, columns = (np.flatnonzero(square.max(axis=a)) for a in (1, 0))
    for line, before, cells in ((rows, where.top, shape[0]), (columns, where.left, shape[1])):
        assert abs(line[0] - before) <= 1
        assert abs(line[-1] + 1 - before - cells * where.scale) <= 1.5
    np.testing.assert_allclose(square[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], 1)
    assert square.dtype == np.float32


def test_letterbox_moves_cells_where_fit_says():
    values = np.zeros((20, 30), np.float64)
    values[7, 21] = 1
    where = patches.fit(20, 30, 300)
    square = patches.letterbox(values, 300)
    y, x = np.array(np.nonzero(square)).mean(axis=1) + 0.5
    np.testing.assert_allclose([y, x], [7.5 * where.scale + where.top, 21.5 * where.scale])


def raw(boxes, scores):
    boxes = np.array(boxes, np.float64)
    centre, size = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    return np.column_stack([centre, size, scores, np.ones(len(boxes))])


@pytest.mark.parametrize("shape", [(60, 80), (90, 40), (33, 33)])
def test_boxes_come_back_to_their_segments(shape):
    where = patches.fit(*shape, 160)
    rng = np.random.default_rng(1)
    low = rng.integers(0, np.array(shape) // 2, (6, 2))
    segments = np.concatenate([low, low + rng.integers(2, 12, (6, 2))], axis=1)
    y0, x0, y1, x1 = segments.T * where.scale
    pixels = np.stack([x0, y0, x1, y1], axis=1) + [where.left, where.top] * 2
    scores = np.linspace(0.9, 0.6, 6)
    seen = patches.select(raw(pixels, scores), where, conf=0.5, nms=0.99)
    patch = patches.Patch(100, 7, np.zeros(shape))
    expected = segments + np.array([100, 7, 100, 7])
    assert patches.whole(seen, patch).tolist() == expected.tolist()


def test_weak_boxes_and_those_hidden_by_better_ones_go():
    where = patches.fit(100, 100, 100)
    boxes = [[0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60], [50, 50, 60, 60], [70, 0, 80, 50]]
    found = patches.select(raw(boxes, [0.7, 0.9, 0.6, 0.8, 0.3]), where, conf=0.3, nms=0.3)
    assert found.boxes.tolist() == [[0, 0, 10, 9], [50, 50, 60, 60]]
    np.testing.assert_allclose(found.scores, [0.9, 0.8])
    both = raw([[0, 0, 10, 10]], [0.6])
    both[0, 5] = 0.4  # objectness passes, its product with the class does not
    assert not len(patches.select(both, where, conf=0.3, nms=0.3).boxes)
    third = patches.suppress(np.array([[0, 0, 3, 1], [2, 0, 5, 1.0]]), np.array([1.0, 0.5]), 0.2)
    assert third.tolist() == [0, 1]  # 1 / 5 is not above 0.2


@pytest.mark.slow
def test_the_longest_map():
    rng = np.random.default_rng(0)
    n = 12590
    values = rng.random((n, n), np.float32) * 0.2
    values[np.arange(n), np.arange(n)] = 0.9
    masked = patches.mask(values)
    assert (np.count_nonzero(masked, axis=1) == 20).all()
    (patch,) = patches.split(masked)
    small, block = patches.pool(patch.values, 640)
    square = patches.letterbox(small, 640)
    assert block == 20
    line = np.diag(square)
    assert (line[10:-10] > 0.45).all()  # between two cells of the diagonal, half of theirs
