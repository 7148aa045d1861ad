# SPDX-License-Identifier: Apache-2.0
"""Tables of rows and seeds: what is finished is read, what is missing made, means are means."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SPLITS = {"test": {"a": 1, "b": 2}, "validation": {"c": 3}}


@pytest.fixture
def rows(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("row_table")


def args(rows, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["x.py", "--out", "o", *words])
    return rows.parsed(rows.arguments("About.\n\nMore.", SPLITS), SPLITS)


def test_a_finished_figure_is_not_made_again_until_config_or_code_change(
    rows, tmp_path, monkeypatch
):
    made = []

    def make():
        made.append(1)
        return {"x": len(made)}

    assert rows.figures(tmp_path, ["a", 0], make, dry=True) is None
    assert [rows.figures(tmp_path, ["a", 0], make)["x"] for _ in range(2)] == [1, 1]
    assert rows.figures(tmp_path, ["a", 0], make, dry=True) == {"x": 1}
    assert rows.figures(tmp_path, ["a", 1], make) == {"x": 2}
    monkeypatch.setattr(rows, "_all_code", lambda: "other")
    assert rows.figures(tmp_path, ["a", 0], make) == {"x": 3}
    assert not list(tmp_path.glob("*.tmp"))


def test_a_figure_that_fails_leaves_nothing(rows, tmp_path):
    with pytest.raises(ZeroDivisionError):
        rows.figures(tmp_path / "out", ["a"], lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rows.arrays(tmp_path / "out", ["a"], lambda: 1 / 0)
    assert not (tmp_path / "out").exists()


def test_arrays_are_kept(rows, tmp_path):
    made = []

    def make():
        made.append(1)
        return {"rows": np.arange(3.0), "seconds": np.float64(2)}

    for _ in range(2):
        found = rows.arrays(tmp_path, ["texts", 0], make)
        np.testing.assert_array_equal(found["rows"], [0, 1, 2])
        assert found["seconds"] == 2
    assert len(made) == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_the_table_has_mean_and_deviation_over_the_seeds_that_are_there(rows):
    found = {"a": [{"x": 1.0, "y": 5.0}, {"x": 2.0, "y": 5.0}], "b": [{"x": 3.0}], "c": []}
    lines = rows.table(found, ("x", "y"), digits=2).splitlines()
    assert lines == [
        "| row | seeds | x | y |",
        "|---|---|---|---|",
        "| a | 2 | 1.50 ± 0.71 | 5.00 |",
        "| b | 1 | 3.00 |  |",
        "| c | 0 |  |  |",
    ]


def test_rows_are_walked_seed_by_seed(rows, monkeypatch, capsys):
    walked = []

    def figures(row, seed):
        walked.append((row, seed))
        return {"x": seed, "hidden": 9} if row == "a" else None

    rows.walk(args(rows, monkeypatch, "--seeds", "4", "5"), figures, ("x",))
    assert walked == [("a", 4), ("b", 4), ("a", 5), ("b", 5)]
    shown = capsys.readouterr().out
    assert "a 4 {'x': 4}" in shown
    assert "hidden" not in shown
    assert "| a | 2 | 4.5 ± 0.7 |\n| b | 0 |  |" in shown


def test_rows_are_those_of_the_split(rows, monkeypatch, capsys):
    assert args(rows, monkeypatch).rows == ["a", "b"]
    assert args(rows, monkeypatch, "--split", "validation").rows == ["c"]
    with pytest.raises(SystemExit):
        args(rows, monkeypatch, "--rows", "c")
    assert "--rows c: test has a, b" in capsys.readouterr().err


def test_the_code_of_some_files_changes_with_them_alone(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    tree = importlib.import_module("code_tree").tree
    assert tree("LICENSE") == tree("LICENSE")
    assert tree("LICENSE") != tree("LICENSE", "setup.py")
    assert tree() == tree("m2jax")
