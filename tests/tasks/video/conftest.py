# SPDX-License-Identifier: Apache-2.0
"""What the tests of libraries share: a model, videos, an index of them."""

import numpy as np
import pytest

from m2jax.tasks.video import features
from tests.tasks.video import clips, libraries


@pytest.fixture(scope="module")
def tower():
    """Features that tell frames apart."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features.Encoder, "_encode", libraries.pixels)
        yield


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return clips.write_model(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def encoder(model, tower):
    return features.Encoder(model, 8)


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="module")
def indexed(encoder, videos, tmp_path_factory):
    out = tmp_path_factory.mktemp("index") / "lib"
    assert libraries.index(encoder, videos, out) == (3, 120, 1)
    return out
