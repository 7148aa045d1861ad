# SPDX-License-Identifier: Apache-2.0
"""The metric equals the published evaluation's numbers, pair by pair and averaged."""

import json

import numpy as np
import pytest

from m2jax.config import UserError
from m2jax.tasks.video import metric
from tests.golden import fixtures

AREA = "video"
EXACT = 1e-12


def rows(file):
    """The objects of a JSON list; none of any other file."""
    found = fixtures.values(file)
    return found if isinstance(found, list) and all(isinstance(r, dict) for r in found) else []


def is_pairs(file):
    """Predictions and labels of single pairs with their scores."""
    return any({"pred", "gt", "expected"} <= set(row) for row in rows(file))


def is_lengths(file):
    """Lengths of unions."""
    return any({"segments", "union"} <= set(row) for row in rows(file))


def is_averages(file):
    """Averages over pairs, by name or given."""
    return any("ratio_pos_neg" in row for row in rows(file))


PAIRS = fixtures.cases(AREA, "metric of pairs", is_pairs)
LENGTHS = fixtures.cases(AREA, "metric lengths", is_lengths)
AVERAGES = fixtures.cases(AREA, "metric averages", is_averages)


def close(found, expected):
    return found == pytest.approx(expected, abs=EXACT, rel=EXACT)


@pytest.mark.parametrize("file", PAIRS)
def test_pairs_one_by_one_and_all_at_once(file):
    for row in rows(file):
        if "raises" in row["expected"]:
            with pytest.raises(UserError, match="is no segment: write"):
                metric.score([row["pred"]], [row["gt"]])
    good = [row for row in rows(file) if "raises" not in row["expected"]]
    together = metric.score([row["pred"] for row in good], [row["gt"] for row in good])
    for number, row in enumerate(good):
        alone = metric.score([row["pred"]], [row["gt"]])
        for key in ("precision", "recall"):
            expected = row["expected"][key]
            assert close(getattr(alone, key)[0], expected), (row["name"], key)
            assert close(getattr(together, key)[number], expected), (row["name"], key)


@pytest.mark.parametrize("file", LENGTHS)
def test_lengths_of_unions(file):
    for row in rows(file):
        starts, ends = np.array(row["segments"]).T
        found = metric.union_lengths(starts, ends, np.zeros(len(starts), np.int64), 1)
        assert found.dtype == np.float32
        assert found[0] == np.float32(row["union"])
        assert close((ends - starts).sum(), row["sum"])


def scores(row, folder):
    """Names and scores of the pairs that an average is over."""
    if "results" in row:
        found = row["results"]
    else:
        named = {
            r["name"]: r for file in folder.glob("*.json") if is_pairs(file) for r in rows(file)
        }
        found = {name: named[name]["expected"] for name in row["pairs"]}
    values = [[r[key] for r in found.values()] for key in ("precision", "recall")]
    return list(found), metric.PairScores(*np.array(values, np.float64).reshape(2, -1))


@pytest.mark.parametrize("file", AVERAGES)
def test_averages(file):
    for row in rows(file):
        keys, found = scores(row, file.parent)
        micro = metric.micro(found, row["ratio_pos_neg"])
        expected = row["expected"]["micro"]
        if "raises" in expected:  # the published code divides by zero
            assert np.isnan(micro.f1) == (np.isnan(micro.recall) and np.isnan(micro.precision))
            assert np.isnan(micro.recall) or np.isnan(micro.precision)
        else:
            for key, value in expected.items():
                assert close(getattr(micro, key), value), key
        if "macro" in row["expected"]:
            macro = metric.macro(found, keys, row["groups"])
            for key, value in row["expected"]["macro"].items():
                assert close(getattr(macro, key.replace("count", "sets")), value), key


def official():
    """Pairs of the de-duplicated test split, their labels ([]: negative), all of the old one."""
    from m2jax.tasks.video import segments

    labels = json.loads(fixtures.shared("data/vcsl/vcsl_test_labels.json").read_text())
    pairs = segments.read_pairs(fixtures.shared("data/vcsl/pair_file_test.csv"))
    return pairs, [labels.get(key, []) for key in pairs], labels


def test_reference_rows_on_the_official_labels():
    """Oracles of the specification: what a perfect, a box-shaped and an ignorant method score."""
    keys, truth, labels = official()
    positives, before = list(labels), list(labels.values())
    frames = {}
    with fixtures.shared("data/vcsl/frames_all.csv").open() as file:
        for line in list(file)[1:]:
            uuid, _, count = line.strip().split(",")
            frames[uuid] = int(count)
    whole = [[[0, 0, *(frames[name] for name in key.split("-"))]] for key in keys]

    def f1(predictions, true=truth):
        found = metric.micro(metric.score(predictions, true))
        return found.f1, found.recall, found.precision

    def moved(first, last):
        return [[[a + first, b + first, c + last, d + last] for a, b, c, d in t] for t in before]

    def hull(boxes):
        values = np.array(boxes)
        return [[*values[:, :2].min(0), *values[:, 2:].max(0)]]

    everywhere = [[[0, 0, *(frames[name] for name in key.split("-"))]] for key in positives]
    assert f1(before, before)[1:] == pytest.approx((0.99977, 0.99977), abs=1e-5)
    assert f1(moved(0, -1), before) == pytest.approx((0.950, 0.906, 0.999), abs=5e-4)
    assert f1(moved(-1, 1), before)[0] == pytest.approx(0.914, abs=5e-4)
    assert f1([*map(hull, before)], before)[0] == pytest.approx(0.930, abs=5e-4)
    assert f1(everywhere, before) == pytest.approx((0.458, 0.9997, 0.297), abs=5e-4)
    assert f1(whole) == pytest.approx((0.257, 0.9997, 0.1475), abs=5e-4)
