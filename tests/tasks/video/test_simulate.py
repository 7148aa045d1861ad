# SPDX-License-Identifier: Apache-2.0
"""Simulated copies: the truth is what was done, every kind changes what it names, all is seeded."""

import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2jax.config import UserError
from m2jax.tasks.video import decode, encode, metric, segments, simulate
from tests.tasks.video.clips import scenes


def numbered(source, count):
    """Frames that carry their source and number."""
    frames = np.zeros((count, 12, 16, 3), np.uint8)
    frames[..., 0], frames[..., 1] = source, np.arange(count)[:, None, None]
    return frames


HOST, REFERENCES = numbered(1, 30), {"a": numbered(2, 40), "b": numbered(3, 50)}
IN_TIME = st.lists(st.sampled_from(["speed", "insertion", "reordering"]), unique=True)


@settings(deadline=None, max_examples=60)
@given(IN_TIME, st.integers(0, 2**16))
def test_the_truth_is_what_was_done(kinds, seed):
    made = simulate.simulate(HOST, REFERENCES, kinds, np.random.default_rng(seed))
    covered = np.zeros(len(made.frames), bool)
    for segment in made.segments:
        own = made.frames[segment.query_start : segment.query_end, 0, 0]
        source = {"a": 2, "b": 3}[segment.reference]
        assert (own[:, 0] == source).all()
        times = own[:, 1]
        assert times[0] == segment.reference_start
        assert times[-1] == segment.reference_end - 1
        assert (np.diff(times.astype(int)) >= 0).all()
        assert not covered[segment.query_start : segment.query_end].any()
        covered[segment.query_start : segment.query_end] = True
    assert (made.frames[~covered][:, 0, 0, 0] == 1).all()  # the rest is the host's
    if "speed" not in kinds:
        for _, q0, r0, q1, r1, _ in made.segments:
            assert q1 - q0 == r1 - r0


def test_kinds_in_time_do_what_they_are_called():
    def made(kinds, seed=3):
        return simulate.simulate(HOST, REFERENCES, kinds, np.random.default_rng(seed)).segments

    assert len(made([])) == 2
    assert len(made(["reordering"])) == 4
    first, second = made(["reordering"])[:2]
    assert first.query_end == second.query_start
    assert first.reference_start >= second.reference_end
    assert len(made(["insertion"])) == 4
    first, second = made(["insertion"])[:2]
    assert second.query_start - first.query_end in range(3, 7)
    assert second.reference_start == first.reference_end
    factors = set()
    for seed in range(12):
        s = made(["speed"], seed)[0]
        factors.add((s.reference_end - s.reference_start) > (s.query_end - s.query_start))
    assert factors == {True, False}


@pytest.mark.parametrize("kind", list(simulate.PICTURES))
def test_pictures_change_and_keep_their_size(kind):
    frames = scenes(0, 20)
    references = {"a": scenes(1, 40)}
    made = simulate.simulate(frames, references, [kind], np.random.default_rng(0))
    (segment,) = made.segments
    own = made.frames[segment.query_start : segment.query_end]
    before = references["a"][segment.reference_start : segment.reference_end]
    assert own.shape == before.shape
    changed = (own != before).any(axis=(1, 2, 3))
    assert changed.all()
    if kind in ("logo", "text"):
        assert (own != before).any(axis=3).mean() < 0.5
    if kind == "flip":
        np.testing.assert_array_equal(own, before[:, :, ::-1])
    again = simulate.simulate(frames, references, [kind], np.random.default_rng(0))
    np.testing.assert_array_equal(again.frames, made.frames)


def test_every_kind_at_once_survives_the_encoder(tmp_path):
    made = simulate.simulate(
        scenes(0, 20), {"a": scenes(1, 40)}, simulate.KINDS, np.random.default_rng(1)
    )
    assert 30 <= made.reencode < 40
    encode.write(tmp_path / "q.mp4", made.frames, 4, factor=made.reencode)
    assert len(list(decode.frames(tmp_path / "q.mp4", 4))) == len(made.frames)
    assert [p.name for p in tmp_path.iterdir()] == ["q.mp4"]


def test_labels_are_vcsl_files_and_perfect_by_its_metric(tmp_path):
    made = simulate.simulate(HOST, REFERENCES, ["insertion"], np.random.default_rng(0))
    truth = simulate.labels("q", made, ["a", "b", "c"])
    out = io.BytesIO()
    segments.write_segments(truth, out)
    (tmp_path / "l.json").write_bytes(out.getvalue())
    read = segments.read_segments(tmp_path / "l.json", forward=True)
    assert json.loads(out.getvalue()) == read == truth
    assert read["q-c"] == []
    scores = metric.score(list(read.values()), list(truth.values()))
    assert metric.micro(scores).f1 == pytest.approx(1, abs=1e-6)


def test_what_cannot_be_is_named(tmp_path):
    rng = np.random.default_rng(0)
    with pytest.raises(UserError, match="edit mirror: unknown: use some of crop"):
        simulate.simulate(HOST, REFERENCES, ["mirror"], rng)
    with pytest.raises(UserError, match="a: too short to cut: give at least 16"):
        simulate.simulate(HOST, {"a": HOST[:15]}, [], rng)
    with pytest.raises(UserError, match="no frames to write"):
        encode.write(tmp_path / "x.mp4", [], 1)
    assert not list(tmp_path.iterdir())
