# SPDX-License-Identifier: Apache-2.0
"""VCSL's files are read and written, mistakes in them named, and the command scores them."""

import io
import json

import pytest

from m2jax.cli.main import main
from m2jax.config import UserError
from m2jax.tasks.video import protocol, segments

LABELS = {"a-b": [[0, 10, 5, 15]], "a-c": [[0, 0, 4, 4], [6, 6, 9, 9]]}
PREDICTIONS = {"a-b": [[0, 10, 5, 15]], "a-c": [], "b-c": [[1, 1, 2, 2]]}


def write(path, document):
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def test_written_files_are_read_back(tmp_path):
    out = io.BytesIO()
    segments.write_segments({"a-b": [(0, 1, 2, 3)], "c-d": []}, out)
    file = write(tmp_path / "l.json", out.getvalue().decode())
    assert segments.read_segments(file, forward=True) == {"a-b": [[0, 1, 2, 3]], "c-d": []}
    out = io.BytesIO()
    segments.write_pairs([("a", "b"), ("c", "d")], out)
    assert segments.read_pairs(write(tmp_path / "p.csv", out.getvalue().decode())) == ["a-b", "c-d"]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ([1], "no object of pairs"),
        ({"a-b": 1}, "pair a-b: no list of segments"),
        ({"a-b": [1]}, "pair a-b: no list of segments"),
        ({"a-b": [], "c-d": [[]]}, r"c-d: pair 0: \[\] is no segment"),
        ({"a-b": [[0, 0, 1, 1, 0.5]]}, "a-b: pair 0: .* is no segment"),
        ('{"a-b": [[0, 0, 1, NaN]]}', "a-b: pair 0: .* is no segment"),
        ({"a-b": [[0, 0, 1, 10**400]]}, "a-b: pair 0: .* is no segment"),
        ({"a-b": [[5, 0, 1, 1]]}, "pair a-b: segment .* ends before it starts"),
    ],
)
def test_bad_predictions_are_named(tmp_path, document, message):
    file = write(tmp_path / "p.json", document)
    with pytest.raises(UserError, match=message) as caught:
        segments.read_segments(file, forward=True)
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


def test_labels_may_be_as_the_official_ones_are(tmp_path):
    file = write(tmp_path / "l.json", {"a-b": [[19, 126, 34, 121]]})
    assert segments.read_segments(file, forward=False)["a-b"] == [[19, 126, 34, 121]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("query,reference\na,b\n", "has no columns query_id,reference_id"),
        ("", "has no columns"),
        ("query_id,reference_id\na,b\na,b\n", "pair a-b is there twice"),
    ],
)
def test_bad_pairs_are_named(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        segments.read_pairs(write(tmp_path / "p.csv", text))
    with pytest.raises(UserError, match=r"none\.csv: No such file"):
        segments.read_pairs(tmp_path / "none.csv")
    (tmp_path / "latin.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        segments.read_pairs(tmp_path / "latin.csv")


def test_protocol_pads_labels_and_asks_for_predictions():
    found = protocol.evaluate(LABELS, PREDICTIONS)
    assert (found["pairs"], found["positives"]) == (3, 2)
    assert found["frr"] == pytest.approx(0.5)
    assert found["far"] == pytest.approx(1)
    with pytest.raises(UserError, match="1 of 2 pairs are missing, the first a-d"):
        protocol.evaluate(LABELS, PREDICTIONS, pairs=["a-b", "a-d"])
    found = protocol.evaluate(LABELS, PREDICTIONS, pairs=["a-b", "a-d"], missing="empty")
    assert found["f1"] == pytest.approx(1, abs=1e-6)
    with pytest.raises(UserError, match="no pairs to score"):
        protocol.evaluate({}, {})
    with pytest.raises(UserError, match="labels: none is of these pairs"):
        protocol.evaluate(LABELS, {"x-y": []}, pairs=["x-y"])


def test_the_command(tmp_path, capsys):
    labels = write(tmp_path / "l.json", LABELS)
    predictions = write(tmp_path / "p.json", PREDICTIONS)
    pairs = write(tmp_path / "p.csv", "query_id,reference_id\na,b\na,c\n")
    sets = write(tmp_path / "s.json", {"test": {"q": ["a-b"], "r": ["a-c"]}})
    words = ["video", "eval", "--labels", str(labels), "--predictions", str(predictions)]
    out = tmp_path / "scores.json"
    assert main([*words, "--pairs", str(pairs), "--sets", str(sets), "--json", str(out)]) == 0
    figures = json.loads(out.read_text())
    assert figures["pairs"] == figures["query_sets"] == 2
    assert figures["recall"] == pytest.approx(0.5)
    assert figures["macro_precision"] == pytest.approx(1)
    assert figures["far"] is None  # no negatives, so no rate; JSON has no nan
    assert "recall           0.5000" in capsys.readouterr().out
    for extra, message in (
        (["--sets", str(sets), "--split", "val"], "no query sets of the split val"),
        (["--pairs", str(tmp_path / "x.csv")], "No such file"),
        (["--json", str(tmp_path / "no" / "x.json")], "no such folder"),
    ):
        assert main([*words, *extra]) == 2
        assert message in capsys.readouterr().err
    write(sets, {"test": {"q": []}})
    assert main([*words, "--sets", str(sets)]) == 2
    assert "query set q: no list of pairs" in capsys.readouterr().err
