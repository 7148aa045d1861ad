# SPDX-License-Identifier: Apache-2.0
"""Frames come at their time whatever the file's own rate; what is no video is named."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from m2jax.config import UserError
from m2jax.tasks.video import decode
from tests.tasks.video.clips import scenes, write_clip, write_sound


def looks_like(found, expected):
    """Which of the expected frames each one is."""
    small = [np.asarray(image.resize((4, 3)), np.float32) for image in found]
    wanted = [values[8::16, 8::16].astype(np.float32) for values in expected]
    return [int(np.argmin([np.abs(one - other).mean() for other in wanted])) for one in small]


def test_frames_at_the_rate_that_is_asked_for(tmp_path):
    frames = scenes(0, 12)
    clip = write_clip(tmp_path / "a.mp4", frames, rate=4)
    assert looks_like(decode.frames(clip, 4), frames) == [*range(12)]
    assert looks_like(decode.frames(clip, 1), frames) == [0, 4, 8]
    assert looks_like(decode.frames(clip, 2), frames) == [0, 2, 4, 6, 8, 10]
    assert looks_like(decode.frames(clip, 8), frames) == [n // 2 for n in range(24)]


def test_a_variable_rate_keeps_its_time(tmp_path):
    frames, times = scenes(1, 6), [0, 0.1, 0.2, 3.05, 3.5, 5]
    clip = write_clip(tmp_path / "a.mkv", frames, times=times, rate=100)
    assert looks_like(decode.frames(clip, 1), frames)[:5] == [0, 2, 2, 2, 4]
    found = decode.frames_at(clip, 1.0, [0, 4, 99])
    assert sorted(found) == [0, 4]


def test_time_starts_with_the_first_frame(tmp_path):
    """Broadcast files start anywhere."""
    frames = scenes(6, 4)
    clip = write_clip(tmp_path / "a.mkv", frames, times=[2, 3, 4, 5], rate=100)
    assert looks_like(decode.frames(clip, 1), frames)[:4] == [0, 1, 2, 3]


def test_sound_may_go_on_after_the_pictures(tmp_path):
    """Matroska says how long all of it lasts, not each track."""
    clip = write_clip(tmp_path / "a.mkv", scenes(7, 3), sound=9)
    assert 3 <= len(list(decode.frames(clip))) <= 4


def test_rotation_is_applied(tmp_path):
    values = np.zeros((1, 48, 64, 3), np.uint8)
    values[:, :12, :, 0] = 255  # red on top
    plain = next(decode.frames(write_clip(tmp_path / "a.mp4", values)))
    assert plain.size == (64, 48)
    turned = next(decode.frames(write_clip(tmp_path / "b.mp4", values, rotation=90)))
    assert turned.size == (48, 64)
    pixels = np.asarray(turned)
    assert pixels[32, 4, 0] > 150 > pixels[32, 40, 0]  # counter-clockwise: the top is on the left


def test_one_frame_is_a_video(tmp_path):
    clip = write_clip(tmp_path / "a.mp4", scenes(2, 1))
    assert len(list(decode.frames(clip))) == 1
    assert len(list(decode.frames(clip, 1 / 60))) == 1


def test_what_is_no_video_is_named(tmp_path):
    good = write_clip(tmp_path / "good.mp4", scenes(3, 40), rate=2).read_bytes()
    cases = {
        "text.mp4": (b"hello", "no video"),
        "empty.mp4": (b"", "no video"),
        "half.mp4": (good[: len(good) // 2], "no video|truncated|damaged"),
        "list.mp4": (b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n#EXT-X-ENDLIST\n", "no video"),
        "list.mov": (b"ffconcat version 1.0\nfile good.mp4\n", "no video"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name}: .*({message})") as caught:
            list(decode.frames(tmp_path / name))
        assert "\n" not in str(caught.value)
        assert str(caught.value).count(name) == 1  # FFmpeg's own words name it again
        assert "Errno" not in str(caught.value)
    with pytest.raises(UserError, match=r"none\.mp4: no such file"):
        list(decode.frames(tmp_path / "none.mp4"))
    for cover in (False, True):
        with pytest.raises(UserError, match="has no picture track, only sound"):
            list(decode.frames(write_sound(tmp_path / "sound.mp4", cover=cover)))


@pytest.mark.parametrize("suffix", ["avi", "mkv", "mpg"])
def test_a_file_cut_short_is_not_taken_for_whole(tmp_path, suffix):
    codec = "mpeg2video" if suffix == "mpg" else "mpeg4"
    clip = write_clip(tmp_path / f"a.{suffix}", scenes(4, 250), rate=25, codec=codec)
    assert 8 <= len(list(decode.frames(clip))) <= 11
    clip.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    if suffix == "mpg":  # it says nowhere how long it is
        assert len(list(decode.frames(clip))) < 8
        return
    with pytest.raises(UserError, match=rf"a\.{suffix}: (ends after|damaged|no video)"):
        list(decode.frames(clip))


def test_limits(tmp_path, monkeypatch):
    clip = write_clip(tmp_path / "a.mp4", scenes(5, 20))
    with pytest.raises(UserError, match=r"rate 0\.0: choose"):
        list(decode.frames(clip, 0.0))
    with pytest.raises(UserError, match="rate nan: choose"):
        list(decode.frames(clip, float("nan")))
    monkeypatch.setattr(decode, "PIXEL_LIMIT", 100)
    with pytest.raises(UserError, match="64 x 48 pixels: over the limit"):
        list(decode.frames(clip))
    monkeypatch.undo()
    monkeypatch.setattr(decode, "MOST_FRAMES", 10)
    with pytest.raises(UserError, match="over 10 frames"):
        list(decode.frames(clip))


def test_a_missing_library_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r'needs PyAV: pip install "m2jax\[video\]"'):
        decode.check()


def test_an_avi_with_empty_frames_is_whole(tmp_path):
    """Such frames repeat the one before: OpenCV's tree.avi has 68 of 444."""
    frames, times = scenes(1, 4), [0, 1, 4, 5]
    clip = write_clip(tmp_path / "a.avi", frames, times=times, rate=100)
    assert looks_like(decode.frames(clip, 1), frames) == [0, 1, 1, 1, 2, 3]
    data = clip.read_bytes()
    clip.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="truncated, copy it again"):
        list(decode.frames(clip, 1))


@pytest.mark.parametrize(
    "times", [[0, 0.1, 0.07, 0.13], [0.07, 0, 0.13, 0.1], [0.2, 0.1, 0, 0.3, 0.6, 0.5, 0.4]]
)
def test_frames_out_of_order_are_put_in_order(times):
    """Decoders give those of files that hide their B frames so: OpenCV's box.mp4."""
    made = [SimpleNamespace(time=t, width=8, height=8, duration=None) for t in times]
    container = SimpleNamespace(decode=lambda stream: iter(made))
    stream = SimpleNamespace(average_rate=10)
    found = list(decode._timed("x", container, stream))
    assert [frame.time for frame, _ in found] == sorted(times)
    np.testing.assert_allclose([time for _, time in found], np.sort(times) - min(times))


def test_raw_frames_run_evenly_and_late_ones_are_passed_over():
    made = [SimpleNamespace(time=None, width=8, height=8, duration=None) for _ in range(6)]
    stream = SimpleNamespace(average_rate=10)
    container = SimpleNamespace(decode=lambda stream: iter(made))
    found = [time for _, time in decode._timed("x", container, stream)]
    np.testing.assert_allclose(found, np.arange(6) / 10)
    times = [*np.arange(10) / 10, 0.2, 1.0]  # one comes far too late
    made[:] = [SimpleNamespace(time=t, width=8, height=8, duration=None) for t in times]
    found = [time for _, time in decode._timed("x", container, stream)]
    np.testing.assert_allclose(found, np.arange(11) / 10)
