# SPDX-License-Identifier: Apache-2.0
"""Frames of a video at a chosen rate, by PyAV (FFmpeg). Files are hostile until they are decoded.

Frame k of a rate f is what is on the screen at k / f seconds after the first frame: videos of a
variable frame rate keep their time, a gap repeats the frame before it. The rotation that players
apply is applied. Nothing but the file itself is opened: containers that name other files or
addresses (playlists) are refused.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from m2jax.config import UserError
from m2jax.data.image import PIXEL_LIMIT

MISSING = 'video: needs PyAV: pip install "m2jax[video]"'
SUFFIXES = {
    *(".3gp", ".asf", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg"),
    *(".ogv", ".ts", ".webm", ".wmv"),
}
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,asf,flv,ogg"
MOST_FRAMES = 200_000  # of one video: two days at one per second
SHORT = 1.5  # seconds by which a video may end before the time its container declares
WHOLE = 0.9  # share of the frames that a container declares; edit lists hide some
REORDERED = 4  # frames that are held back, to be given in order of time
RATES = (1 / 60, 60.0)  # frames per second that may be asked for

TURNS = {
    90: Image.Transpose.ROTATE_90,
    180: Image.Transpose.ROTATE_180,
    270: Image.Transpose.ROTATE_270,
}


def frames(path: Path, rate: float = 1.0) -> Iterator[Image.Image]:
    """Decodes a video.

    Args:
        path: the file.
        rate: frames per second.

    Yields:
        RGB frames; at least one.

    Raises:
        UserError: PyAV is not installed; the file is missing, no video, damaged, without a picture
            track or a single frame; it ends long before it says; its frames are too large or too
            many to be honest.
    """
    if not RATES[0] <= rate <= RATES[1]:
        raise UserError(f"rate {rate}: choose {RATES[0]:.3f} to {RATES[1]:.0f} frames per second")
    count, decoded, shown, end = 0, 0, None, 0.0
    with _opened(path) as (container, stream):
        for frame, time in _timed(path, container, stream):
            # Due before this frame: the one that is on the screen until now.
            while shown is not None and count / rate < time - 1e-6:
                yield _image(shown)
                count = _counted(path, count)
            shown, end = frame, max(end, time + _length(frame, stream))
            decoded += 1
        if shown is None:
            raise UserError(f"{path}: holds no frame: leave it out")
        declared = _declared(container, stream)
        if end < declared - max(SHORT, 0.02 * declared):
            raise UserError(
                f"{path}: ends after {end:.1f} of {declared:.1f} seconds: truncated, copy it again"
            )
        # Of a cut AVI, FFmpeg guesses the duration anew; a whole one may hold empty frames, which
        # repeat the one before.
        own_rate = float(stream.average_rate or 0)
        full = stream.frames / own_rate if own_rate else math.inf
        if decoded < WHOLE * stream.frames and end < WHOLE * full:
            raise UserError(
                f"{path}: ends after {decoded:,} of {stream.frames:,} frames: truncated, copy it "
                "again"
            )
        while count == 0 or count / rate < end - 1e-6:
            yield _image(shown)
            count = _counted(path, count)


def frames_at(path: Path, rate: float, wanted: Sequence[int]) -> dict[int, Image.Image]:
    """Some frames of ``frames``, by their number; those past the end are left out.

    Raises:
        UserError: as ``frames``, but not for what comes after the last one wanted.
    """
    found: dict[int, Image.Image] = {}
    left = set(wanted)
    for number, image in enumerate(frames(path, rate)):
        if not left:
            break
        if number in left:
            found[number] = image
            left.discard(number)
    return found


def check() -> None:
    """Says that PyAV is missing before any long work is done.

    Raises:
        UserError: it is.
    """
    _av()


def _av() -> Any:
    try:
        import av
    except ImportError:
        raise UserError(MISSING) from None
    return av


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """The container and its picture track."""
    av = _av()
    if not path.is_file():
        raise UserError(f"{path}: no such file: check the path")
    options = {"protocol_whitelist": "file", "format_whitelist": CONTAINERS}
    try:
        container = av.open(str(path.absolute()), options=options)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise UserError(f"{path}: no video ({_reason(error)}): replace or leave it out") from None
    try:
        pictures = [s for s in container.streams.video if not _is_cover(s)]
        if not pictures:
            raise UserError(f"{path}: has no picture track, only sound or text: leave it out")
        if pictures[0].codec_context is None:
            raise UserError(f"{path}: its pictures are in an unknown format: convert it first")
        pictures[0].thread_type = "AUTO"
        yield container, pictures[0]
    except (av.FFmpegError, MemoryError) as error:
        raise UserError(f"{path}: damaged ({_reason(error)}): copy it again") from None
    finally:
        container.close()


def _is_cover(stream: Any) -> bool:
    """Whether a track is the picture on an album's cover."""
    return bool(int(stream.disposition) & _av().stream.Disposition.attached_pic)


def _timed(path: Path, container: Any, stream: Any) -> Iterator[tuple[Any, float]]:
    """Frames with their seconds after the first; those that go back in time are passed over."""
    first, last = None, -math.inf
    for time, frame in _in_order(_stamped(path, container, stream)):
        first = time if first is None else first
        if time - first < last:
            continue
        last = time - first
        yield frame, last


def _stamped(path: Path, container: Any, stream: Any) -> Iterator[tuple[float, Any]]:
    """Frames as the decoder gives them, with their times."""
    after = 0.0
    for frame in container.decode(stream):
        if frame.width * frame.height > PIXEL_LIMIT:
            raise UserError(
                f"{path}: {frame.width} x {frame.height} pixels: over the limit of "
                f"{PIXEL_LIMIT:,}: scale it down first"
            )
        # Raw streams have no times: they run evenly.
        time = after if frame.time is None else frame.time
        after = time + _length(frame, stream)
        yield time, frame


def _in_order(frames: Iterator[tuple[float, Any]]) -> Iterator[tuple[float, Any]]:
    """Frames by time, where the decoder gives neighbours in another order.

    It does so for files that say that they hold no frames which are shown later than decoded, but
    do (OpenCV's box.mp4): half of their frames would be passed over.
    """
    waiting: list[tuple[float, int, Any]] = []
    for number, (time, frame) in enumerate(frames):
        heapq.heappush(waiting, (time, number, frame))
        if len(waiting) > REORDERED:
            time, _, frame = heapq.heappop(waiting)
            yield time, frame
    while waiting:
        time, _, frame = heapq.heappop(waiting)
        yield time, frame


def _length(frame: Any, stream: Any) -> float:
    """Seconds that a frame is shown."""
    if frame.duration and frame.time_base:
        return float(frame.duration * frame.time_base)
    return float(1 / stream.average_rate) if stream.average_rate else 0.0


def _declared(container: Any, stream: Any) -> float:
    """Seconds that the container says the pictures last; 0: it does not say."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    if not container.duration or any(other.type != "video" for other in container.streams):
        return 0.0
    # Matroska counts from 0, where the first frame may be shown later.
    late = float(stream.start_time * stream.time_base) if stream.start_time else 0.0
    return container.duration / 1e6 - max(late, 0.0)


def _counted(path: Path, count: int) -> int:
    if count + 1 >= MOST_FRAMES:
        raise UserError(f"{path}: over {MOST_FRAMES:,} frames: cut it, or take fewer per second")
    return count + 1


def _image(frame: Any) -> Image.Image:
    image = frame.to_image()
    turn = TURNS.get(round(frame.rotation) % 360)  # counter-clockwise, as PIL turns
    return image if turn is None else image.transpose(turn)


def _reason(error: BaseException) -> str:
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return said.splitlines()[0][:120]
