# SPDX-License-Identifier: Apache-2.0
"""``m2jax video train``, and what it makes in ``align``, ``index`` and ``search``."""

import json

import numpy as np
import pytest

from m2jax.cli.main import main
from m2jax.tasks.video import arrays, features, library, saved, vectors
from tests.tasks.video import clips

# milvus-lite's server leaves sockets and threads to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

QUICK = ["--steps", "2", "--batch-size", "2", "--size", "32", "--width", "4"]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Features of three videos, of which the first copied 40 frames of the second."""
    place = tmp_path_factory.mktemp("labelled")
    rng = np.random.default_rng(0)
    made = {n: rng.normal(size=(count, 36)) for n, count in (("q", 100), ("r", 80), ("s", 60))}
    made["q"][30:70] = made["r"][20:60]
    for name, values in made.items():
        unit = values / np.linalg.norm(values, axis=1, keepdims=True)
        np.save(place / f"{name}.npy", unit.astype(np.float32))
    (place / "labels.json").write_text(json.dumps({"q-r": [[30, 20, 70, 60]]}))
    (place / "pairs.csv").write_text("query_id,reference_id\nq,r\nq,s\n")
    return place


def train(*words):
    arrays.read_features.cache_clear()
    return main(["video", "train", *QUICK, *map(str, words)])


@pytest.fixture(scope="module")
def parts(labelled, tmp_path_factory):
    """One training of each kind on these."""
    place = tmp_path_factory.mktemp("parts")
    source = ["--features", labelled, "--labels", labelled / "labels.json"]
    source += ["--pairs", labelled / "pairs.csv"]
    for kind in ("spd", "ske", "ssan"):
        assert train("--kind", kind, "--out", place / kind, *source) == 0
    return place


def align(labelled, out, *words, source="--features"):
    arrays.read_features.cache_clear()
    base = ["video", "align", source, str(labelled), "--pairs", str(labelled / "pairs.csv")]
    code = main([*base, "--out", str(out), *map(str, words)])
    return code, json.loads(out.read_text()) if out.exists() else None


def test_trainings_say_what_they_are(parts):
    found = {kind: saved.read(parts / kind) for kind in ("spd", "ske", "ssan")}
    assert {kind: part.settings.window for kind, part in found.items()} == {
        "spd": 1,
        "ske": 4,
        "ssan": 4,
    }
    assert [found[k].detector is None for k in ("spd", "ske", "ssan")] == [False, True, False]
    assert [found[k].scorer is None for k in ("spd", "ske", "ssan")] == [True, False, False]
    assert {part.dim for part in found.values()} == {36}


def test_the_detector_aligns(labelled, parts, tmp_path, capsys):
    words = ["--method", "spd", "--set", "conf=0.005"]
    code, inner = align(labelled, tmp_path / "a.json", *words, "--detector", parts / "spd")
    assert code == 0
    assert set(inner) == {"q-r", "q-s"}
    assert inner["q-r"]
    _, over = align(
        labelled, tmp_path / "b.json", *words, "--detector", parts / "spd", "--end-exclusive"
    )
    assert over == {k: [[a, b, c + 1, d + 1] for a, b, c, d in own] for k, own in inner.items()}
    code, keys = align(labelled, tmp_path / "c.json", *words, "--detector", parts / "ssan")
    assert code == 0
    assert keys != inner
    for box in keys["q-r"]:
        assert 0 <= box[0] <= box[2] < 100
        assert 0 <= box[1] <= box[3] < 80
    (labelled / "maps").mkdir(exist_ok=True)
    words += ["--detector", parts / "ssan"]
    (tmp_path / "c.json").unlink()
    code, nothing = align(labelled, tmp_path / "c.json", *words, source="--maps")
    assert (code, nothing) == (2, None)
    assert "keyframes are chosen by features" in capsys.readouterr().err
    words = ["--method", "DP", "--keyframes", parts / "spd"]
    assert align(labelled, tmp_path / "c.json", *words) == (2, None)
    assert "was trained on all frames" in capsys.readouterr().err
    words = ["--method", "spd", "--detector", parts / "spd", "--keyframes", parts / "ske"]
    assert align(labelled, tmp_path / "c.json", *words) == (2, None)
    said = f"was trained on one frame of 1, --keyframes {parts / 'ske'} keeps one of 4: train one"
    assert said in capsys.readouterr().err


def test_classical_methods_align_keyframes_too(labelled, parts, tmp_path):
    words = ["--method", "DP", "--set", "min_length=3", "--end-exclusive"]
    code, found = align(labelled, tmp_path / "a.json", *words, "--keyframes", parts / "ske")
    assert code == 0
    assert found["q-s"] == []
    # Two steps of training leave keyframes as they fall: the copy is found by their half.
    assert all(box[2] - box[0] < 80 for box in found["q-r"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--kind", "other"], "kind='other': use spd, ske or ssan"),
        (["--kind", "ske", "--window", "1"], "keyframes need 2 and more"),
        (["--features", "."], "--features and --labels: pass both"),
        (["--features", ".", "--videos", "x"], "choose one"),
        (["--model", "m"], "--model and --videos: pass both"),
        (["--pairs", "x"], "belongs to --features"),
        (["--queries", "0"], "choose 1 to 10,000"),
        (["--model", "m", "--videos", "x", "--rate", "0"], "--rate 0.0: choose 0.017 to 60"),
        (["--start", "nowhere"], "name a folder made by m2jax video train"),
        (["--size", "33"], "multiple of 16"),
    ],
)
def test_bad_input_is_one_line(words, message, tmp_path, capsys):
    assert train("--out", tmp_path / "p", *words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "p").exists()


def test_nothing_is_written_over(parts, capsys):
    assert train("--out", parts / "spd") == 2
    assert "spd" in capsys.readouterr().err


@pytest.fixture(scope="module", autouse=True)
def milvus(tmp_path_factory):
    """Loads it while no test's own capture is on: it keeps the stderr that it finds at first."""
    vectors.Vectors(str(tmp_path_factory.mktemp("milvus") / "first.db")).close()


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Three videos of 40 frames; a query with 24 frames of the first."""
    place = tmp_path_factory.mktemp("videos")
    (place / "library").mkdir()
    frames = [clips.scenes(seed, 40) for seed in range(3)]
    for name, own in zip("abc", frames, strict=True):
        clips.write_clip(place / "library" / f"{name}.mp4", own)
    query = np.concatenate([clips.scenes(9, 12), frames[0][8:32], clips.scenes(8, 8)])
    clips.write_clip(place / "query.mp4", query)
    return place


def test_edited_copies_of_videos(tower, model, videos, tmp_path):
    words = ["--model", model, "--videos", videos / "library", "--queries", "4", "--kind", "ssan"]
    assert train("--out", tmp_path / "p", *words) == 0
    part = saved.read(tmp_path / "p")
    assert part.dim == 36
    assert part.model == features.Encoder(model).identity.fingerprint


@pytest.mark.slow
def test_a_library_of_keyframes(tower, model, videos, parts, tmp_path, capsys):
    out = tmp_path / "lib"
    base = ["video", "index", "--model", model, "--videos", str(videos / "library")]
    base += ["--out", str(out), "--ann", "exact"]
    words = ["--keyframes", str(parts / "ske")]
    assert main([*base, *words]) == 0
    found = library.load(out)
    assert [(v.frames, v.length) for v in found.videos] == [(10, 40)] * 3
    for number in range(3):
        kept = np.load(library.kept_file(out, number))
        assert (kept // 4).tolist() == list(range(10))
        assert len(np.load(library.features_file(out, number))) == 10
        edges = library.edges(out, found, number)
        assert (edges[0], edges[-1], len(edges)) == (0, 40, 11)
    found_json = tmp_path / "found.json"
    search = ["video", "search", "--model", model, "--index", str(out)]
    search += ["--query", str(videos / "query.mp4"), "--full-maps", "--json", str(found_json)]
    settings = [w for s in ("min_sim=0.5", "min_length=1") for w in ("--set", s)]
    assert main([*search, "--method", "tn", *settings]) == 0
    matches = json.loads(found_json.read_text())["matches"]
    assert matches
    assert all(match["video"] == "a.mp4" for match in matches)
    assert matches[0]["query_end"] - matches[0]["query_start"] > 8
    detector = ["--method", "spd", "--set", "conf=0.005", "--detector"]
    assert main([*search, *detector, str(parts / "ssan")]) == 0
    assert json.loads(found_json.read_text())["matches"]
    capsys.readouterr()
    assert main([*search, *detector, str(parts / "spd")]) == 2
    assert "was trained on one frame of 1, the library holds one of 4" in capsys.readouterr().err
    # All frames, or keyframes of another training, do not go into this folder.
    assert main(base) == 2
    assert "was made with keyframes" in capsys.readouterr().err
    assert main([*base, *words, "--most-alike", "0.9"]) == 2
    assert "choose another folder" in capsys.readouterr().err
    np.save(library.kept_file(out, 0), np.arange(10)[::-1])
    assert main([*search, "--method", "tn", *settings]) == 2
    assert "not the 10 keyframes of a.mp4" in capsys.readouterr().err


def test_keyframes_of_another_model_are_refused(tower, model, videos, parts, tmp_path, capsys):
    other = clips.write_model(tmp_path / "other", seed=5)
    words = ["--model", other, "--videos", videos / "library", "--queries", "2", "--kind", "ske"]
    assert train("--out", tmp_path / "p", *words) == 0
    base = ["video", "index", "--model", model, "--videos", str(videos / "library")]
    assert main([*base, "--out", str(tmp_path / "x"), "--keyframes", str(tmp_path / "p")]) == 2
    assert "features of another model" in capsys.readouterr().err
    assert main([*base, "--out", str(tmp_path / "x"), "--keyframes", str(parts / "spd")]) == 2
    assert "was trained on all frames" in capsys.readouterr().err
    assert main([*base, "--out", str(tmp_path / "x"), "--most-alike", "0.5"]) == 2
    assert "pass --keyframes" in capsys.readouterr().err
