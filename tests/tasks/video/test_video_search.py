# SPDX-License-Identifier: Apache-2.0
"""Search: planted copies are found, by every index, and in the time of the video."""

import json
import sys

import numpy as np
import pytest

from m2jax.cli.main import main
from m2jax.tasks.video import align, library, pattern, search, ssan
from tests.tasks.video.libraries import SETTINGS, SLACK, TRUTH, index, near

# milvus-lite's server leaves sockets and threads to the garbage collector.
pytestmark = [
    pytest.mark.usefixtures("tower"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


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
    said = capsys.readouterr()
    assert "copied segments" in said.out
    assert "no background" not in said.err
    text = (tmp_path / "page.html").read_text()
    assert text.count("data:image/jpeg;base64,") >= 20
    assert "http" not in text.replace("http-equiv", "")  # self-contained


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


def test_one_video_tells_no_background(model, videos, indexed, tmp_path, capsys):
    """Without one what is no copy is found too; with that of a larger library it is not."""
    clip, out, found = videos / "library" / "a.mp4", tmp_path / "lib", tmp_path / "found.json"
    words = ["video", "index", "--model", model, "--videos", str(clip), "--ann", "scan"]
    assert main([*words, "--out", str(out)]) == 0
    assert "lib: one video tells no background" in capsys.readouterr().err
    words = ["video", "search", "--model", model, "--index", str(out), "--full-maps"]
    words += ["--query", str(videos / "query.mp4"), "--json", str(found)]

    def match(*more):
        assert main([*words, *more]) == 0
        (one,) = json.loads(found.read_text())["matches"]
        return search.Match(**one), "one video tells no background" in capsys.readouterr().err

    more, warned = match()
    assert not near(more, TRUTH["a.mp4"], SLACK["TN"])
    assert warned
    assert match("--raw") == (more, False)
    assert match("--background", "0") == (more, False)
    one, warned = match("--background", str(library.load(indexed).background))
    assert near(one, TRUTH["a.mp4"], SLACK["TN"])
    assert not warned
    for wrong in (["--background", "1"], ["--background", "-0.1"], ["--background", "0", "--raw"]):
        assert main([*words, *wrong]) == 2
        assert "choose 0 to below 1, and not beside --raw" in capsys.readouterr().err


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
