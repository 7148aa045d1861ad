# SPDX-License-Identifier: Apache-2.0
"""Simulated copies: the truth is what was done, every kind changes what it names, all is seeded."""

import io
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

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


@settings(deadline=None, max_examples=60)
@given(IN_TIME, st.integers(0, 2**16))
def test_the_host_is_there_whole_and_once(kinds, seed):
    made = simulate.simulate(HOST, REFERENCES, kinds, np.random.default_rng(seed))
    rest = np.ones(len(made.frames), bool)
    for own in made.segments:
        rest[own.query_start : own.query_end] = False
    for early, late in itertools.pairwise(made.segments):
        if early.reference == late.reference:  # between its pieces is what was inserted, if any
            rest[early.query_end : late.query_start] = False
    assert made.frames[rest][:, 0, 0, 1].tolist() == list(range(len(HOST)))
    # Every copy has surroundings: a third of the host before, between and behind.
    assert made.segments[0].query_start == 10
    assert made.segments[-1].query_end == len(made.frames) - 10


@pytest.mark.parametrize("kinds", [[], ["reordering"], ["insertion"]])
def test_pieces_are_as_long_as_they_may_be(kinds):
    """From what is asked for up to half of the reference."""
    sizes = []
    for seed in range(60):
        made = simulate.simulate(
            HOST, {"a": numbered(2, 40)}, kinds, np.random.default_rng(seed), shortest=12
        )
        own = [one.query_end - one.query_start for one in made.segments]
        sizes += own if "reordering" in kinds else [sum(own)]
    assert (min(sizes), max(sizes)) == (12, 20)


def test_reordered_pieces_do_not_overlap():
    for seed in range(40):
        rng = np.random.default_rng(seed)
        made = simulate.simulate(HOST, {"a": numbered(2, 40)}, ["reordering"], rng)
        first, second = made.segments
        assert first.reference_start >= second.reference_end


def test_speed_takes_frames_evenly():
    factors = set()
    for seed in range(30):
        rng = np.random.default_rng(seed)
        made = simulate.simulate(HOST, {"a": numbered(2, 60)}, ["speed"], rng)
        (one,) = made.segments
        times = made.frames[one.query_start : one.query_end, 0, 0, 1].astype(int)
        places = np.arange(len(times))
        fits = [
            factor
            for factor in (0.5, 0.75, 1.5, 2.0)
            if np.array_equal(times - one.reference_start, np.floor(places * factor))
        ]
        assert len(fits) == 1
        # All of the piece is shown, but for what the last step passes over.
        assert one.reference_end - one.reference_start >= simulate.SHORTEST - fits[0]
        factors.update(fits)
    assert factors == {0.5, 0.75, 1.5, 2.0}


def test_kinds_in_time_do_what_they_are_called():
    def made(kinds, seed=3):
        return simulate.simulate(HOST, REFERENCES, kinds, np.random.default_rng(seed)).segments

    assert len(made([])) == 2
    assert simulate.simulate(HOST, REFERENCES, [], np.random.default_rng(0)).reencode == 0
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


@pytest.mark.parametrize("kind", list(simulate.PICTURES))
def test_a_segment_is_edited_alike(kind):
    """A still that is copied stays one."""
    still = scenes(1, 1).repeat(40, axis=0)
    made = simulate.simulate(scenes(0, 20), {"a": still}, [kind], np.random.default_rng(4))
    (segment,) = made.segments
    own = made.frames[segment.query_start : segment.query_end]
    assert (own == own[:1]).all()


def test_every_edit_is_applied_and_to_the_copy_alone():
    """What is inserted into a copy comes from the host as it was."""
    host, references = scenes(0, 30), {"a": scenes(1, 40)}
    kinds = ["insertion", "flip", "letterbox"]
    made = simulate.simulate(host, references, kinds, np.random.default_rng(2))
    first, second = made.segments
    inserted = made.frames[first.query_end : second.query_start]
    assert len(inserted) >= 3
    assert all((frame == host).all(axis=(1, 2, 3)).any() for frame in inserted)
    own = made.frames[first.query_start]
    alone = simulate.simulate(host, references, kinds[::2], np.random.default_rng(2))
    assert (own == 0).all(axis=2).mean() > 0.1  # bars
    assert (own != alone.frames[alone.segments[0].query_start]).any()  # and it is flipped


@pytest.mark.parametrize("seed", range(6))
def test_edits_are_as_strong_as_they_say(seed):
    def edited(kind, values):
        return np.asarray(simulate.PICTURES[kind](Image.fromarray(values), rng()))

    def rng():
        return np.random.default_rng(seed)

    white = np.full((120, 160, 3), 255, np.uint8)
    ramps = np.zeros_like(white)
    ramps[..., 0], ramps[..., 1] = np.arange(160), np.arange(120)[:, None]
    left = np.ptp(edited("crop", ramps), axis=(0, 1)) / (159, 119, 1)
    assert (left[:2] > 0.57).all()
    assert (left[:2] < 0.88).all()
    bars = (edited("letterbox", white) == 0).all(axis=2)
    assert 0.13 < bars.mean() < 0.32
    assert abs(bars[:60].mean() - bars[60:].mean()) < 0.02
    assert abs(bars[:, :80].mean() - bars[:, 80:].mean()) < 0.02
    changed = {kind: (edited(kind, white) != white).any(axis=2) for kind in ("logo", "text")}
    assert 0.012 < changed["logo"].mean() < 0.09  # all of it is in the picture
    assert not changed["text"][:60].any()
    assert changed["text"].any()
    small = (edited("picture-in-picture", white) == 255).all(axis=2)
    assert 0.24 < small.mean() < 0.5
    sharp = np.zeros_like(white)
    sharp[:, 80:] = 255
    soft = edited("blur", sharp)
    assert (soft[60, [78, 81], 0] != sharp[60, [78, 81], 0]).all()
    assert (soft[60, [60, 100], 0] == sharp[60, [60, 100], 0]).all()


def test_colours_change_and_a_third_turns_grey():
    image = Image.fromarray(scenes(2, 1)[0])
    grey = 0
    before = np.asarray(image)
    for seed in range(60):
        values = np.asarray(simulate.colour(image, np.random.default_rng(seed)))
        assert (values != before).mean() > 0.5
        grey += (values == values[..., :1]).all()
    assert 8 <= grey <= 32


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
    first = made.segments[0]
    assert read[f"q-{first.reference}"][0] == [
        *(first.query_start, first.reference_start, first.query_end, first.reference_end)
    ]
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
