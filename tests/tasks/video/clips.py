# SPDX-License-Identifier: Apache-2.0
"""Videos made for tests, and a model with random weights that tells their frames apart."""

from fractions import Fraction

import av
import jax
import numpy as np

from m2jax import config
from m2jax.checkpoint import folder
from m2jax.data.image import Preprocess
from m2jax.models import params as params_lib
from tests.data import own_files

SIZES = {"width": 16, "heads": 2, "backbone_layers": 1, "vl_layers": 1, "out_dim": 16}


def write_model(place, seed=1, **changed):
    """A folder of a model of 16 pixels."""
    sizes = {**SIZES, "image_size": 16, "patch_size": 8, "vocab_size": 100, "max_text_len": 8}
    model = config.resolve(config.Model(name="m2-encoder-demo", **{**sizes, **changed}))
    params = jax.jit(lambda: params_lib.initialise(model, jax.random.key(seed)))()
    folder.write(
        place,
        model,
        params,
        tokenizer=own_files.TOKENIZER.to_dict(),
        preprocess=Preprocess(16).to_dict(),
    )
    return str(place)


def scenes(seed, count, size=(64, 48)):
    """Frames of coarse random colours, each unlike the others."""
    rng = np.random.default_rng(seed)
    width, height = size
    tiles = rng.integers(0, 256, (count, 3, 4, 3), np.uint8)
    return tiles.repeat(height // 3, axis=1).repeat(width // 4, axis=2)


def write_clip(
    path, frames, *, rate=1, times=None, codec="mpeg4", rotation=0, bits=4_000_000, sound=0
):
    """Encodes frames; ``times`` in seconds make the rate variable, ``sound`` is of silence."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.bit_rate = "yuv420p", bits
        stream.codec_context.time_base = Fraction(1, 100) if times else Fraction(1, rate)
        if rotation:
            stream.set_display_rotation(rotation)
        silence = container.add_stream("aac", rate=8000) if sound else None
        for number, values in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(values), format="rgb24")
            frame.pts = round(100 * times[number]) if times else number
            frame.time_base = stream.codec_context.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if silence:
            _write_silence(container, silence, sound)
    return path


def _write_silence(container, stream, seconds):
    for number in range(round(seconds * 8000 / 1024)):
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate, frame.pts = 8000, 1024 * number
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def write_sound(path, *, cover=False):
    """A file with sound alone, or with the picture of an album's cover beside."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        if cover:
            picture = container.add_stream("mjpeg", rate=1)
            picture.width, picture.height, picture.pix_fmt = 64, 48, "yuvj420p"
            picture.disposition = av.stream.Disposition.attached_pic
        if cover:
            frame = av.VideoFrame.from_ndarray(scenes(0, 1)[0], format="rgb24")
            frame.pts, frame.time_base = 0, Fraction(1, 1)
            container.mux([*picture.encode(frame), *picture.encode(None)])
        _write_silence(container, stream, 1)
    return path
