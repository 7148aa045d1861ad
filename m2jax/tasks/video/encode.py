# SPDX-License-Identifier: Apache-2.0
"""Frames to a video file, by PyAV; what simulated copies are re-encoded with."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import numpy as np

from m2jax.config import UserError
from m2jax.tasks.video.decode import MISSING


def write(path: Path, frames: Iterable[np.ndarray], rate: float, *, factor: int = 23) -> None:
    """Writes an H.264 file, whole or not at all.

    Args:
        path: of the file; its suffix says which container.
        frames: [height, width, 3] uint8, of one even size.
        rate: frames per second.
        factor: constant rate factor: 18 looks like the source, 40 is poor.

    Raises:
        UserError: PyAV is not installed, or there are no frames.
    """
    try:
        import av
    except ImportError:
        raise UserError(MISSING) from None
    steps = Fraction(rate).limit_denominator(1000)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        with av.open(str(temporary), "w") as container:
            stream = None
            for number, values in enumerate(frames):
                if stream is None:
                    stream = container.add_stream("libx264", rate=steps)
                    stream.height, stream.width = values.shape[:2]
                    stream.pix_fmt = "yuv420p"
                    stream.options = {"crf": str(factor), "preset": "veryfast"}
                    stream.codec_context.time_base = 1 / steps
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(values), format="rgb24")
                frame.pts, frame.time_base = number, 1 / steps
                container.mux(stream.encode(frame))
            if stream is None:
                raise UserError(f"{path}: no frames to write: give at least one")
            container.mux(stream.encode(None))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
