# SPDX-License-Identifier: Apache-2.0
"""Labelled pairs of edited clips: their truth, what is encoded how, what is left out."""

from types import SimpleNamespace

import numpy as np
import pytest

from m2jax.config import UserError
from m2jax.tasks.video import decode, edited, encode, simulate
from tests.tasks.video import clips

IN_TIME = ["speed", "insertion", "reordering"]
NAMES = ["a", "b", "c", "d"]


def numbered():
    """Four clips of 100 frames; each frame is of its clip's number and its own."""
    found = {}
    for number, name in enumerate(NAMES):
        frames = np.zeros((100, 8, 8, 3), np.uint8)
        frames[..., 0], frames[..., 1] = number, np.arange(100)[:, None, None]
        found[name] = frames
    return found


def corpus(kinds, count=12):
    """Of numbered clips, with (clip, frame) as features; and the factors that were asked for."""
    factors = []

    def features(frames, factor):
        factors.append(factor)
        return frames[:, 0, 0, :2].astype(np.float32)

    rng = np.random.default_rng(0)
    return edited.corpus(numbered(), features, kinds=kinds, count=count, rng=rng), factors


def test_the_truth_of_every_pair_is_what_was_taken():
    found, _ = corpus(IN_TIME)
    queries = sorted({query for query, _ in found.pairs})
    assert len(queries) == 12
    for query in queries:
        own = found.features[query]
        mine = {
            r: boxes for (q, r), boxes in zip(found.pairs, found.boxes, strict=True) if q == query
        }
        (host,) = set(NAMES) - set(mine)  # with all clips but its host
        assert sorted(mine) == [name for name in NAMES if name != host]
        assert sum(bool(boxes) for boxes in mine.values()) == 2
        rest = np.ones(len(own), bool)
        for name, boxes in mine.items():
            for q0, r0, q1, r1 in boxes:
                np.testing.assert_array_equal(own[q0], found.features[name][r0])
                np.testing.assert_array_equal(own[q1 - 1], found.features[name][r1 - 1])
                assert (own[q0:q1, 0] == NAMES.index(name)).all()
                rest[q0:q1] = False
        assert (own[rest, 0] == NAMES.index(host)).all()


def test_a_host_gives_its_frames_once():
    found, _ = corpus(["flip"])
    for query in dict.fromkeys(query for query, _ in found.pairs):
        own = found.features[query]
        host = NAMES.index(*(set(NAMES) - {r for q, r in found.pairs if q == query}))
        numbers = own[own[:, 0] == host, 1]
        np.testing.assert_array_equal(np.diff(numbers), 1)
        assert len(numbers) == edited.HOST
    starts = {tuple(found.features[query][0]) for query, _ in found.pairs}
    assert len(starts) > 3


def test_queries_are_encoded_as_they_were_edited():
    _, factors = corpus(["re-encode"], count=3)
    assert factors[:4] == [0] * 4  # the clips as they are
    assert all(30 <= factor < 40 for factor in factors[4:])
    _, factors = corpus(["flip"], count=3)
    assert factors == [0] * 7


@pytest.fixture
def encoder():
    """Gives each frame's coarse pixels; squares are of 16."""

    def square(image):
        return image.resize((16, 16))

    def video(path, rate):
        rows = [
            np.asarray(square(image), np.float32).ravel() for image in decode.frames(path, rate)
        ]
        return np.stack(rows)

    return SimpleNamespace(
        bundle=SimpleNamespace(preprocessing=SimpleNamespace(square=square)), video=video
    )


@pytest.fixture
def videos(tmp_path):
    return {
        name: clips.write_clip(tmp_path / f"{name}.mp4", clips.scenes(seed, 20))
        for seed, name in enumerate("abc")
    }


def made(encoder, videos, rate=1.0, count=2):
    said = []
    options = {"rate": rate, "count": count, "seed": 0, "say": said.append}
    return edited.of_videos(encoder, videos, **options), said


def test_what_cannot_be_cut_is_left_out_by_name(encoder, videos, tmp_path):
    videos["short"] = clips.write_clip(tmp_path / "short.mp4", clips.scenes(7, 15))
    videos["sound"] = clips.write_sound(tmp_path / "sound.m4a")
    found, said = made(encoder, videos)
    assert set(found.features) == {"a", "b", "c", "edited 0", "edited 1"}
    assert len(said) == 2
    assert any("short.mp4: 15 frames are too few to be cut" in line for line in said)
    assert any("sound.m4a: has no picture track" in line for line in said)
    del videos["c"]
    with pytest.raises(UserError, match="videos: 2: edited queries need three and more"):
        made(encoder, videos)


def test_long_videos_and_many_are_cut_down(encoder, videos, monkeypatch):
    monkeypatch.setattr(edited, "MOST_FRAMES", 17)
    monkeypatch.setattr(edited, "MOST_VIDEOS", 3)
    found, _ = made(encoder, {**videos, "d": videos["a"], "e": videos["b"]})
    known = [name for name in found.features if not name.startswith("edited")]
    assert len(known) == 3
    assert {len(found.features[name]) for name in known} == {17}


def test_each_query_is_written_with_its_factor(encoder, videos, monkeypatch):
    written, write = [], encode.write

    def watched(path, frames, rate, *, factor):
        written.append((len(frames), rate, factor))
        write(path, frames, rate, factor=factor)

    monkeypatch.setattr(encode, "write", watched)
    monkeypatch.setattr(simulate, "KINDS", ("re-encode",))
    found, _ = made(encoder, videos)
    assert written[:3] == [(20, 1.0, edited.GOOD)] * 3
    assert all(30 <= factor < 40 for _, _, factor in written[3:])
    assert [len(own) for own in found.features.values()] == [count for count, _, _ in written]


def test_frames_lost_by_encoding_are_no_truth(encoder, videos):
    real = encoder.video
    encoder.video = lambda path, rate: real(path, rate)[1:]
    with pytest.raises(UserError, match="20 frames became 19 when encoded: choose a whole number"):
        made(encoder, videos)
