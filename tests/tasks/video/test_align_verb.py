# SPDX-License-Identifier: Apache-2.0
"""``m2jax video align`` reads features and maps, and says what is wrong with them."""

import io
import json
import re

import numpy as np
import pytest

from m2jax.cli.main import main
from m2jax.tasks.video import align, arrays
from tests.data.hostile import TERABYTES


@pytest.fixture
def folder(tmp_path):
    """Two videos that share 20 frames, from frame 10 of the query and 5 of the reference on."""
    rng = np.random.default_rng(0)
    query, reference = rng.normal(size=(40, 64)), rng.normal(size=(50, 64))
    reference[5:25] = query[10:30]
    for name, values in (("q", query), ("r", reference)):
        unit = values / np.linalg.norm(values, axis=1, keepdims=True)
        np.save(tmp_path / f"{name}.npy", unit.astype(np.float32))
    (tmp_path / "pairs.csv").write_text("query_id,reference_id\nq,r\n")
    return tmp_path


def run(folder, *words, source=("--features", ".")):
    option, where = source
    out = folder / "out.json"
    base = ["video", "align", option, str(folder / where), "--pairs", str(folder / "pairs.csv")]
    code = main([*base, "--out", str(out), *words])
    arrays.read_features.cache_clear()
    return code, json.loads(out.read_text()) if out.exists() else None


@pytest.mark.parametrize("method", ["HV", "TN", "DP", "DTW"])
def test_features_give_the_planted_copy(folder, method):
    _, found = run(folder, "--method", method)
    _, over = run(folder, "--method", method, "--end-exclusive")
    similarity = arrays.map_of_features(folder, "q-r")
    assert found == {"q-r": align.align(method, [similarity])[0].tolist()}
    assert any(a <= 12 and b <= 7 and c >= 27 and d >= 22 for a, b, c, d in found["q-r"])
    assert over == {"q-r": [[a, b, c + 1, d + 1] for a, b, c, d in found["q-r"]]}


def test_maps_give_the_same_as_their_features(folder):
    (folder / "maps").mkdir()
    np.save(folder / "maps" / "q-r.npy", arrays.map_of_features(folder, "q-r"))
    arrays.read_features.cache_clear()
    assert run(folder) == run(folder, source=("--maps", "maps"))


def test_settings_reach_the_method(folder):
    assert run(folder, "--method", "DTW", "--set", "min_length=39")[1] == {"q-r": []}


def saved(values):
    out = io.BytesIO()
    np.save(out, values)
    return out.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "r.npy: no NumPy array"),
        (b"\x93NUMPY", "no NumPy array"),
        (saved(np.eye(3, dtype=np.float32))[:-9], "no NumPy array"),
        (saved(np.array([{}, 1], object)), "no NumPy array"),
        (TERABYTES, r"no NumPy array \(claims float32 of shape \(1048576, 1048576\) in 64 bytes"),
        (saved(np.full((2, 64), np.nan)), "features: holds nan"),
        (saved(np.zeros((0, 64))), r"of shape \(0, 64\)"),
        (saved(np.eye(4) * 3), "row 0 has length 3: divide"),
        (saved(np.eye(4)), "features of q and r have 64 and 4 numbers"),
        (None, "r.npy: No such file"),
    ],
)
def test_bad_features_are_named_and_nothing_is_written(folder, capsys, content, message):
    (folder / "r.npy").unlink()
    if content is not None:
        (folder / "r.npy").write_bytes(content)
    code, found = run(folder)
    assert (code, found) == (2, None)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, error), error


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("../q,r", "is no name of a video"),
        (".q,r", "is no name of a video"),
        ("q-1,r", "not QUERY-REFERENCE"),
    ],
)
def test_names_lead_nowhere_else(folder, capsys, pair, message):
    (folder / "pairs.csv").write_text(f"query_id,reference_id\n{pair}\n")
    assert run(folder)[0] == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "XX"], "unknown: use one of HV, TN, DP, DTW"),
        (["--set", "min_sim"], "no setting: write NAME=NUMBER"),
        (["--set", "min_sim=x"], "no setting: write NAME=NUMBER"),
        (["--set", "x=1"], "x: unknown setting"),
    ],
)
def test_wrong_words_are_named(folder, capsys, words, message):
    assert run(folder, *words)[0] == 2
    assert message in capsys.readouterr().err
