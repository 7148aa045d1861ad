# SPDX-License-Identifier: Apache-2.0
"""Libraries: what they hold; runs go on; other models and settings are refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from m2jax.cli.main import main
from m2jax.config import UserError
from m2jax.tasks.video import features, library, pattern, ssan
from tests.tasks.video import clips
from tests.tasks.video.libraries import index

# milvus-lite's server leaves sockets and threads to the garbage collector.
pytestmark = [
    pytest.mark.usefixtures("tower"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


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
