# SPDX-License-Identifier: Apache-2.0
"""Features of frames are the model's, and finite."""

import numpy as np
import pytest

from m2jax.config import UserError
from m2jax.tasks.video import decode, features


@pytest.fixture(scope="module")
def encoder(model):
    return features.Encoder(model, 8)


def test_features_are_the_models(encoder, videos):
    clip = videos / "library" / "a.mp4"
    found = encoder.video(clip, 0.5)  # 20 frames, in batches of 8
    images = [*decode.frames(clip, 0.5)]
    bundle = encoder.bundle
    expected = np.concatenate(
        [np.asarray(bundle.encode_image(bundle.preprocess(images[i : i + 8]))) for i in (0, 8, 16)]
    )
    np.testing.assert_allclose(found, expected, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


def test_nan_features_are_named(encoder, videos, monkeypatch):
    def broken(self, squares):
        return np.full((len(squares), 4), np.nan, np.float32)

    monkeypatch.setattr(features.Encoder, "_encode", broken)
    with pytest.raises(UserError, match=r"a\.mp4: the model gives no finite features for frame 0"):
        encoder.video(videos / "library" / "a.mp4", 1.0)
