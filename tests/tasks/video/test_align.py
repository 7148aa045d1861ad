# SPDX-License-Identifier: Apache-2.0
"""The arrays' methods equal the same written in loops, one by one and in stacks of any sizes."""

import dataclasses

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from m2jax.config import UserError
from m2jax.tasks.video import align, dynamic, maps, network, paths, warping
from tests.tasks.video import straightforward


def similarity(seed, rows, columns, levels, dtype):
    """Noise with a copied diagonal; few levels: many ties."""
    rng = np.random.default_rng(seed)
    values = rng.uniform(-0.3, 0.6, (rows, columns))
    offset = int(rng.integers(-rows + 1, columns))
    for q in range(max(0, -offset), min(rows, columns - offset)):
        if rng.random() < 0.8:
            values[q, q + offset] = rng.uniform(0.6, 1)
    return (np.round(values * levels) / levels if levels else values).astype(dtype)


MAPS = st.builds(
    similarity,
    st.integers(0, 2**16),
    st.integers(1, 30),
    st.integers(1, 30),
    st.sampled_from([0, 0, 1, 4]),
    st.sampled_from([np.float32, np.float64]),
)
LENGTHS = st.integers(0, 4)
SETTINGS = {
    "HV": st.fixed_dictionaries(
        {
            "min_sim": st.sampled_from([0.0, 0.2, 0.7]),
            "iou_thresh": st.sampled_from([0.1, 0.5, 0.9]),
            "max_peaks": st.sampled_from([3, 100]),
        }
    ),
    "DTW": st.fixed_dictionaries(
        {
            "discontinue": st.integers(0, 4),
            "min_sim": st.sampled_from([0.0, 0.3]),
            "min_length": LENGTHS,
        }
    ),
    "DP": st.fixed_dictionaries(
        {
            "discontinue": st.integers(0, 4),
            "min_sim": st.sampled_from([0.0, 1.0, 1.3, 1.5]),
            "ave_sim": st.sampled_from([0.3, 1.3]),
            "min_length": LENGTHS,
            "diagonal_thres": st.integers(0, 9),
        }
    ),
    "TN": st.fixed_dictionaries(
        {
            "tn_max_step": st.integers(1, 8),
            "tn_top_k": st.integers(1, 5),
            "max_path": st.integers(0, 4),
            "min_sim": st.sampled_from([-0.2, 0.0, 0.2, 0.5]),
            "min_length": LENGTHS,
            "max_iou": st.sampled_from([0.1, 0.3, 0.9]),
        }
    ),
}


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_equal_to_the_loops(name):
    @settings(deadline=None, max_examples=60)
    @given(st.lists(MAPS, min_size=1, max_size=4), SETTINGS[name])
    def compare(several, chosen):
        found = align.align(align.with_settings(name, chosen), several)
        for one, boxes in zip(several, found, strict=True):
            assert boxes.tolist() == straightforward.METHODS[name](one, **chosen)

    compare()


@settings(deadline=None, max_examples=10)
@given(st.lists(MAPS, max_size=5), st.integers(4, 4000))
@example([], 4)
def test_stacks_hold_every_map_once(several, cells):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maps, "STACK", cells)
        patch.setattr(network, "NODES", cells)
        seen = []
        for members, stack in maps.stacks(several):
            seen += members
            for row, number in enumerate(members):
                n, m = several[number].shape
                np.testing.assert_array_equal(stack[row, :n, :m], several[number])
                assert (stack[row, n:] == -np.inf).all()
                assert (stack[row, :, m:] == -np.inf).all()
        assert sorted(seen) == list(range(len(several)))
        cut = {name: align.align(name, several) for name in align.BENCHMARK}
    for name, found in cut.items():
        whole = align.align(name, several)
        assert [b.tolist() for b in found] == [b.tolist() for b in whole]


def test_stops_of_a_path():
    path = np.array([(0, 0), (0, 1), (0, 2), (1, 3), (2, 4), (2, 5), (2, 6), (3, 6)])
    assert paths.cut(path, 3) == [(0, 8)]
    assert paths.cut(path, 2) == [(3, 4), (7, 8)]
    corner = np.array([(0, 0), (1, 1), (1, 2), (1, 3), (2, 3), (3, 3), (4, 4)])
    assert paths.cut(corner, 2) == [(0, 1), (4, 3), (6, 7)]  # (4, 3) runs backwards: dropped


def test_boxes_that_overlap_by_just_the_threshold_stay():
    voting = align.with_settings("HV", {"min_sim": 0.5, "iou_thresh": 0.25})
    found = align.align(voting, [np.ones((2, 2), np.float32)])[0]
    assert found.tolist() == [[0, 0, 1, 1], [1, 0, 1, 0], [0, 1, 0, 1]]


def test_of_equal_ways_the_one_from_above_is_taken():
    ring = np.ones((3, 3), np.float32)
    ring[1, 1] = 0
    (path,) = warping.warping_paths([ring])
    assert path.tolist() == [[0, 0], [0, 1], [1, 2], [2, 2]]


def test_half_steps_are_compared_in_float64():
    """In float32 the two sums are equal, and the first of them would be taken."""
    values = np.array([[-1000, 0.25], [0.25 + 2**-20, 128]], np.float32)
    sums = dynamic.accumulate(values[None], min_sim=0, discontinue=3)
    assert sums.came[0, 1, 1] == paths.LEFT
    assert sums.best.dtype == np.float32


def test_where_a_segment_is_over():
    one = np.full((12, 12), -0.1, np.float32) + 1.05 * np.eye(12, dtype=np.float32)
    last = align.align("DTW", [one])[0]
    over = align.align("DTW", [one], end_exclusive=True)[0]
    assert last.tolist() == [[0, 0, 11, 11]]
    assert over.tolist() == [[0, 0, 12, 12]]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.full((2, 2), np.nan), "map 1: holds nan"),
        (np.array([[0, np.inf]]), "map 1: holds infinite"),
        (np.zeros((0, 3)), r"map 1: float64 of shape \(0, 3\)"),
        (np.zeros(3), r"of shape \(3,\)"),
        (np.array([["a"]]), "pass numbers"),
    ],
)
def test_what_is_no_map_is_named(value, message):
    for name in align.BENCHMARK:
        with pytest.raises(UserError, match=message):
            align.align(name, [np.zeros((3, 3)), value])


@pytest.mark.parametrize(
    ("name", "chosen", "message"),
    [
        ("XX", {}, "unknown: use one of HV, TN, DP, DTW"),
        ("HV", {"min_similarity": 1}, "unknown setting: use one of min_sim"),
        ("HV", {"max_peaks": 0.5}, "max_peaks=0.5: no int"),
        ("HV", {"min_sim": float("nan")}, "min_sim=nan: no float"),
        ("TN", {"tn_max_step": 0}, "must be at least 1"),
    ],
)
def test_wrong_settings_are_named(name, chosen, message):
    with pytest.raises(UserError, match=message):
        align.with_settings(name, chosen)


def test_half_precision_maps_are_read_in_float32():
    half = (np.eye(12) * 0.9).astype(np.float16)
    found = align.align("DP", [half])[0]
    assert found.tolist() == align.align("DP", [half.astype(np.float32)])[0].tolist()
    assert dataclasses.asdict(align.BENCHMARK["DP"])["discontinue"] == 9


@settings(max_examples=60, deadline=None)
@given(st.lists(MAPS, min_size=1, max_size=4), SETTINGS["TN"])
def test_links_one_by_one_are_the_same_as_in_arrays(several, chosen):
    method = align.with_settings("TN", chosen)
    with pytest.MonkeyPatch.context() as patch:
        found = []
        for thin in (-1, 10**9):
            patch.setattr(network, "THIN", thin)
            found.append([own.tolist() for own in align.align(method, several)])
    assert found[0] == found[1]


@pytest.mark.parametrize("count", [1, 3, 50])
def test_the_best_columns_are_those_of_a_stable_sort(count):
    values = np.random.default_rng(0).integers(-2, 5, (40, 30)).astype(np.float32)
    expected = np.argsort(-values, axis=1, kind="stable")[:, :count]
    np.testing.assert_array_equal(network._best(values, count), expected)


def test_spans_are_the_same_with_ends_exclusive():
    one = similarity(1, 40, 50, 0, np.float32)
    (spans,) = align.spans("TN", [one])
    assert spans.dtype == np.float64
    (over,) = align.align("TN", [one], end_exclusive=True)
    np.testing.assert_array_equal(spans, over)
    rounded = np.array([[0.4, 1.6, 9.6, 12.2], [3.4, 0, 3.3, 9]])
    assert align.whole(rounded, end_exclusive=True).tolist() == [[0, 2, 10, 12]]
    assert align.whole(rounded, end_exclusive=False).tolist() == [[0, 2, 9, 11]]
