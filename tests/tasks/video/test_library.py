# SPDX-License-Identifier: Apache-2.0
"""Index, search and page: planted copies are found; runs go on; other models are refused."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from m2jax.cli.main import main
from m2jax.config import UserError
from m2jax.tasks.video import (
    align,
    decode,
    features,
    library,
    page,
    pattern,
    search,
    ssan,
)
from tests.tasks.video import clips

# milvus-lite's server leaves sockets and threads to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


REAL = features.Encoder._encode


def pixels(self, squares):
    """Centred pixels as unit rows: random weights find all frames alike."""
    rows = np.stack([np.asarray(s.resize((4, 3)), np.float32).ravel() for s in squares])
    rows -= rows.mean(axis=1, keepdims=True)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(scope="module", autouse=True)
def tower():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features.Encoder, "_encode", pixels)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return clips.write_model(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def encoder(model):
    return features.Encoder(model, 8)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Three library videos; a query with 14 frames of one and 12 of another."""
    place = tmp_path_factory.mktemp("videos")
    (place / "library" / "sub").mkdir(parents=True)
    frames = [clips.scenes(seed, 40) for seed in range(3)]
    for name, own in zip(("a.mp4", "sub/b.mkv", "c.avi"), frames, strict=True):
        clips.write_clip(place / "library" / name, own)
    parts = [clips.scenes(9, 10), frames[0][5:19], clips.scenes(8, 6), frames[1][20:32]]
    clips.write_clip(place / "query.mp4", np.concatenate(parts))
    (place / "library" / "broken.mp4").write_bytes(b"no video")
    (place / "library" / "notes.txt").write_text("none")
    return place


TRUTH = {"a.mp4": (10, 24, 5, 19), "sub/b.mkv": (30, 42, 20, 32)}


def index(encoder, videos, out, **options):
    found = features.find_videos([videos / "library"], "--videos")
    return library.build(encoder, found, out, say=lambda line: None, **options)


@pytest.fixture(scope="module")
def indexed(encoder, videos, tmp_path_factory):
    out = tmp_path_factory.mktemp("index") / "lib"
    assert index(encoder, videos, out) == (3, 120, 1)
    return out


def near(match, expected, slack):
    return np.abs(np.array(match[1:5]) - expected).max() <= slack


# A path of TN may start at any frame up to a step before its first similar one.
SLACK = {"TN": 9, "DP": 1}
SETTINGS = {"TN": ["min_sim=0.5", "min_length=3"], "DP": ["discontinue=1", "min_sim=1.5"]}


@pytest.mark.parametrize("method", sorted(SETTINGS))
def test_the_command_finds_the_copies(model, videos, indexed, tmp_path, capsys, method):
    words = ["video", "search", "--model", model, "--index", str(indexed)]
    words += ["--query", str(videos / "query.mp4"), "--method", method, "--full-maps"]
    words += [word for setting in SETTINGS[method] for word in ("--set", setting)]
    out = tmp_path / "found.json"
    assert main([*words, "--json", str(out), "--html", str(tmp_path / "page.html")]) == 0
    document = json.loads(out.read_text())
    matches = [search.Match(**match) for match in document["matches"]]
    for name, truth in TRUTH.items():
        mine = [match for match in matches if match.video == name]
        assert any(near(match, truth, SLACK[method]) for match in mine), matches
    assert document["seconds"] == 42
    text = (tmp_path / "page.html").read_text()
    assert text.count("data:image/jpeg;base64,") >= 20
    assert "http" not in text.replace("http-equiv", "")  # self-contained
    assert "copied segments" in capsys.readouterr().out


def test_sparse_maps_find_them_too(encoder, videos, indexed):
    found = library.load(indexed, encoder.identity)
    store = library.open_index(indexed, found)
    try:
        frames = encoder.video(videos / "query.mp4", found.rate)
        matches = search.search(
            found, store, frames, folder=indexed, method=align.chosen("TN", SETTINGS["TN"])
        )
        hits = store.search(frames, 5, found.kind)
        left = search.search(
            found,
            store,
            frames,
            folder=indexed,
            method=align.chosen("TN", SETTINGS["TN"]),
            leave_out="a.mp4",
        )
    finally:
        store.close()
    for name, truth in TRUTH.items():
        assert any(near(m, truth, SLACK["TN"]) for m in matches if m.video == name), matches
    assert {match.video for match in left} <= {"sub/b.mkv", "c.avi"}
    # Exact neighbours, by the features that lie in the folder.
    stored = np.concatenate([np.load(library.features_file(indexed, n)) for n in range(3)])
    best = np.sort(frames @ stored.T, axis=1)[:, ::-1][:, :5]
    np.testing.assert_allclose(hits.score, best, atol=1e-4)
    names = [found.videos[n].name for n in hits.video[10:24, 0]]
    assert names == ["a.mp4"] * 14
    assert hits.frame[10:24, 0].tolist() == [*range(5, 19)]


def test_a_scan_finds_what_milvus_finds(encoder, videos, indexed, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pymilvus", None)  # which it does not need
    assert index(encoder, videos, tmp_path / "lib", kind="scan") == (3, 120, 1)
    found = library.load(tmp_path / "lib", encoder.identity)
    assert found.background == library.load(indexed).background
    assert not (tmp_path / "lib" / "frames.db").exists()
    matches = search.search(
        found,
        library.open_index(tmp_path / "lib", found),
        encoder.video(videos / "query.mp4", found.rate),
        folder=tmp_path / "lib",
        method=align.chosen("TN", SETTINGS["TN"]),
    )
    for name, truth in TRUTH.items():
        assert any(near(m, truth, SLACK["TN"]) for m in matches if m.video == name), matches


def test_libraries_on_one_cluster_have_collections_of_their_own(encoder, videos, tmp_path):
    """Frames are numbered from 0 in each: one collection would mix them up."""
    uri, clip = str(tmp_path / "cluster.db"), videos / "library" / "a.mp4"
    other = videos / "library" / "c.avi"
    for name, file in (("one", clip), ("two", other)):
        library.build(
            encoder, {name: file}, tmp_path / name, kind="exact", uri=uri, say=lambda line: None
        )
    for name, file in (("one", clip), ("two", other)):
        found = library.load(tmp_path / name)
        store = library.open_index(tmp_path / name, found)
        try:
            hits = store.search(encoder.video(file, 1.0), 1, found.kind)
        finally:
            store.close()
        assert hits.frame[:, 0].tolist() == [*range(40)]
        np.testing.assert_allclose(hits.score, 1, atol=1e-4)


def test_keyframes_keep_the_time_of_the_video(encoder, videos, tmp_path):
    out, choose = tmp_path / "lib", pattern.Keyframes(ssan.Part(ssan.Settings(window=2), 36))
    assert index(encoder, videos, out, kind="scan", choose=choose) == (3, 60, 1)
    found = library.load(out)
    assert [(video.frames, video.length) for video in found.videos] == [(20, 40)] * 3
    every = encoder.video(videos / "library" / "c.avi", 1.0)
    np.testing.assert_array_equal(np.load(library.features_file(out, 1)), every[::2])
    edges = library.edges(out, found, 1)
    np.testing.assert_array_equal(edges, [0, *np.arange(1.5, 38, 2), 40])
    matches = search.search(
        found,
        library.open_index(out, found),
        encoder.video(videos / "query.mp4", found.rate),
        folder=out,
        method=align.chosen("DP", [*SETTINGS["DP"], "min_length=3"]),
        choose=choose,
    )
    # Of the copy from an odd frame to an even one nothing alike is kept.
    assert any(near(m, TRUTH["sub/b.mkv"], 2.6) for m in matches if m.video == "sub/b.mkv"), matches


def test_features_are_the_models(encoder, videos, monkeypatch):
    clip = videos / "library" / "a.mp4"
    monkeypatch.setattr(features.Encoder, "_encode", REAL)
    found = encoder.video(clip, 0.5)  # 20 frames, in batches of 8
    images = [*decode.frames(clip, 0.5)]
    bundle = encoder.bundle
    expected = np.concatenate(
        [np.asarray(bundle.encode_image(bundle.preprocess(images[i : i + 8]))) for i in (0, 8, 16)]
    )
    np.testing.assert_allclose(found, expected, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


def test_what_a_library_holds(encoder, videos, indexed):
    found = library.load(indexed)
    assert [v.name for v in found.videos] == ["a.mp4", "c.avi", "sub/b.mkv"]
    again = encoder.video(videos / "library" / "a.mp4", 1.0)
    np.testing.assert_array_equal(again, np.load(library.features_file(indexed, 0)))
    skipped = [json.loads(line) for line in (indexed / "skipped.jsonl").read_text().splitlines()]
    assert [row["video"] for row in skipped] == ["broken.mp4"]
    assert 0.1 < found.background < 0.6


def test_a_stopped_run_goes_on(encoder, videos, tmp_path, monkeypatch):
    real, seen = features.Encoder.video, []

    def failing(self, path, rate):
        seen.append(path.name)
        if len(seen) == 3:
            raise RuntimeError("device lost")
        return real(self, path, rate)

    with monkeypatch.context() as patch:
        patch.setattr(features.Encoder, "video", failing)
        with pytest.raises(RuntimeError, match="device lost"):
            index(encoder, videos, tmp_path / "lib", kind="scan")
    assert len(library.load(tmp_path / "lib").videos) == 1  # broken.mp4 was the second
    seen.clear()

    def counting(self, path, rate):
        seen.append(path.name)
        return real(self, path, rate)

    monkeypatch.setattr(features.Encoder, "video", counting)
    assert index(encoder, videos, tmp_path / "lib", kind="scan") == (3, 80, 1)
    assert "a.mp4" not in seen
    assert index(encoder, videos, tmp_path / "lib", kind="scan") == (0, 0, 1)
    (line,) = (tmp_path / "lib" / "skipped.jsonl").read_text().splitlines()  # of the last run
    assert json.loads(line)["video"] == "broken.mp4"
    sound = {"a.mp4": videos / "library" / "a.mp4"}
    library.build(encoder, sound, tmp_path / "lib", kind="scan", say=lambda line: None)
    assert not (tmp_path / "lib" / "skipped.jsonl").read_text()


def test_what_was_not_stored_is_stored_by_the_next_run(encoder, videos, tmp_path, monkeypatch):
    """Features of all are there, the database fell away: it gets all of them again."""
    tried = []

    def insert(out, found, fresh):
        tried.append(fresh)
        if len(tried) == 1:
            raise RuntimeError("no database")

    monkeypatch.setattr(library, "_insert", insert)
    with pytest.raises(RuntimeError, match="no database"):
        index(encoder, videos, tmp_path / "lib")
    with pytest.raises(UserError, match="indexing was not finished: run m2jax video index again"):
        library.open_index(tmp_path / "lib", library.load(tmp_path / "lib"))
    assert index(encoder, videos, tmp_path / "lib") == (3, 0, 1)
    assert tried == [[0, 1, 2]] * 2
    assert index(encoder, videos, tmp_path / "lib") == (0, 0, 1)
    assert len(tried) == 2


def test_the_background_is_that_of_other_videos(tmp_path):
    """Frames of one video are alike, which says nothing of copies."""
    rows = np.array([[1, 0], [0.6, 0.8]], np.float32)
    videos = [library.Video(str(n), str(n), [0, 0], 9) for n in range(2)]
    for number, row in enumerate(rows):
        features.write(library.features_file(tmp_path, number), row[None].repeat(9, axis=0))
    found = library.Library("m", "f", 1.0, "scan", "", videos)
    assert library._background(tmp_path, found) == pytest.approx(0.6)


def test_videos_join_a_library(encoder, videos, indexed, tmp_path):
    everything = features.find_videos([videos / "library"], "--videos")
    first = {name: path for name, path in everything.items() if name != "sub/b.mkv"}
    out = tmp_path / "lib"
    for some, done in ((first, (2, 80, 1)), (everything, (1, 40, 1))):
        assert library.build(encoder, some, out, kind="scan", say=lambda line: None) == done
    found, whole = library.load(out), library.load(indexed)
    assert [video.name for video in found.videos] == [video.name for video in whole.videos]
    assert found.background == whole.background  # of all, not of the first ones


def test_other_models_and_settings_are_refused(encoder, videos, indexed, tmp_path, capsys):
    other = clips.write_model(tmp_path / "other", seed=2)
    words = ["video", "search", "--model", other, "--index", str(indexed)]
    assert main([*words, "--query", str(videos / "query.mp4")]) == 2
    error = capsys.readouterr().err
    assert "made with the model m2-encoder-demo m (" in error
    assert "not m2-encoder-demo other (" in error
    with pytest.raises(UserError, match=r"was made with rate 1\.0, not 2\.0: choose another"):
        index(encoder, videos, indexed, rate=2.0)
    with pytest.raises(UserError, match="was made with kind 'hnsw', not 'scan': choose another"):
        index(encoder, videos, indexed, kind="scan")
    with pytest.raises(UserError, match="was made with keyframes '', not '"):
        index(encoder, videos, indexed, choose=pattern.Keyframes(ssan.Part(ssan.Settings(), 36)))
    with pytest.raises(UserError, match="--ann ivf: use one of exact, hnsw, scan"):
        index(encoder, videos, tmp_path / "x", kind="ivf")


def test_a_changed_video_is_refused(encoder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clip = clips.write_clip(Path("v.mp4"), clips.scenes(3, 12))

    def build():
        out = tmp_path / "lib"
        library.build(encoder, {"v.mp4": clip}, out, kind="scan", say=lambda line: None)

    build()
    (video,) = library.load(tmp_path / "lib").videos
    assert video.path == str(tmp_path / "v.mp4")  # found from any folder
    size = clip.stat().st_size
    clip.write_bytes(clip.read_bytes()[:-1] + b"x")  # as many bytes
    assert clip.stat().st_size == size
    with pytest.raises(UserError, match=r"v\.mp4 has changed since: index it into a new folder"):
        build()


@pytest.mark.parametrize("text", ["{", "[]", '{"videos": [{}]}', '{"videos": 3}', "\xff"])
def test_a_damaged_library_is_one_line(tmp_path, text):
    (tmp_path / "library.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"library\.json: damaged"):
        library.load(tmp_path)
    with pytest.raises(UserError, match="no library of videos: make one"):
        library.load(tmp_path / "none")


def test_nan_features_are_named(encoder, videos, monkeypatch):
    def broken(self, squares):
        return np.full((len(squares), 4), np.nan, np.float32)

    monkeypatch.setattr(features.Encoder, "_encode", broken)
    with pytest.raises(UserError, match=r"a\.mp4: the model gives no finite features for frame 0"):
        encoder.video(videos / "library" / "a.mp4", 1.0)


def test_words_are_checked_before_work(model, videos, indexed, tmp_path, capsys):
    words = ["video", "search", "--model", model, "--index", str(indexed), "--query", "x.mp4"]
    for extra, message in (
        (["--candidates", "0"], "--candidates 0: choose"),
        (["--html", str(tmp_path)], "is a folder"),
        (["--method", "YY"], "unknown: use one of"),
        ([], "--query x.mp4: no such file"),
        (
            ["--query", str(videos / "query.mp4"), "--leave-out", "a"],
            "--leave-out a: no video of",
        ),
    ):
        assert main([*words, *extra]) == 2
        assert message in capsys.readouterr().err
    words = ["video", "index", "--model", model, "--out", str(tmp_path / "o"), "--videos"]
    for extra, message in (
        ([str(tmp_path)], "holds no video"),
        (["none"], "no such file"),
        ([str(tmp_path), "--rate", "0"], "--rate 0.0: choose"),
    ):
        assert main([*words, *extra]) == 2
        assert message in capsys.readouterr().err


def test_the_page_says_where_its_frames_end(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "MOST", 2)
    match = search.Match("a", 0, 5, 1, 6, 0.9)
    document = {"query": "q", "seconds": 9.0, "rate": 1.0, "model": "m", "method": "TN"}
    document["matches"] = [match._replace(score=s)._asdict() for s in (0.9, 0.8, 0.7)]
    text = page.render(document, tmp_path / "gone.mp4", {"a": (tmp_path / "x.mp4", 10.0)})
    assert "3 segments of 1 videos, frames of the first 2." in text
    assert text.count("<span>query</span><span>reference</span>") == 2
    assert text.count("<h3>") == 3


def test_the_page_shows_hostile_names_as_text(tmp_path):
    match = search.Match("<script>", 0, 5, 1, 6, 0.9)
    document = {
        **{"query": "<b>q</b>", "seconds": 9.0, "rate": 1.0, "model": "m", "method": "TN"},
        "matches": [match._asdict()],
    }
    text = page.render(document, tmp_path / "gone.mp4", {"<script>": (tmp_path / "x.mp4", 10.0)})
    assert "<script>" not in text
    assert "<b>q" not in text
    assert "class=none" in text  # the files are gone, the times are not
    assert "query 0:00.0 to 0:05.0, reference 0:01.0 to 0:06.0" in text
