# SPDX-License-Identifier: Apache-2.0
"""A scan of all stored features: exact, by video and frame, and as Milvus gives it."""

import numpy as np
import pytest

from m2jax.config import UserError
from m2jax.tasks.video import features, library, scan, vectors

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
LENGTHS = (3, 1, 40, 7)


def unit(rng, rows, dim=16):
    found = rng.standard_normal((rows, dim), np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


@pytest.fixture
def stored(tmp_path):
    rng = np.random.default_rng(0)
    own = [unit(rng, length) for length in LENGTHS]
    files = [tmp_path / f"{number}.npy" for number in range(len(own))]
    for path, rows in zip(files, own, strict=True):
        features.write(path, rows)
    return files, own


def test_hits_are_the_nearest_frames_of_their_videos(stored):
    files, own = stored
    queries = unit(np.random.default_rng(1), 9)
    found = scan.Scan(files, LENGTHS).search(queries, 6)
    cosines = queries @ np.concatenate(own).T
    np.testing.assert_allclose(found.score, -np.sort(-cosines, axis=1)[:, :6], atol=1e-6)
    for query, videos, frames, scores in zip(queries, *found, strict=True):
        named = [own[video][frame] @ query for video, frame in zip(videos, frames, strict=True)]
        np.testing.assert_allclose(named, scores, atol=1e-6)
        assert len({*zip(videos, frames, strict=True)}) == 6


def test_it_gives_what_milvus_gives(stored, tmp_path):
    files, own = stored
    queries = unit(np.random.default_rng(2), 5)
    index = vectors.Vectors(str(tmp_path / "frames.db"))
    try:
        index.create(16, "exact")
        for video, rows in enumerate(own):
            index.insert(video, rows)
        index.flush()
        for limit in (4, 60):  # more than are stored: -1 behind
            expected = index.search(queries, limit, "exact")
            found = scan.Scan(files, LENGTHS).search(queries, limit)
            np.testing.assert_array_equal(found.video, expected.video)
            np.testing.assert_array_equal(found.frame, expected.frame)
            np.testing.assert_allclose(found.score, expected.score, atol=1e-5)
    finally:
        index.close()
    assert (found.video[:, sum(LENGTHS) :] == -1).all()


def test_what_does_not_fit_is_named(stored):
    files, own = stored
    with pytest.raises(UserError, match="features of 16 numbers, the query's have 8"):
        scan.Scan(files, LENGTHS).search(np.ones((1, 8), np.float32), 2)
    features.write(files[2], own[2][:5])
    with pytest.raises(UserError, match=r"2\.npy: 5 frames of 16 numbers, not 40 of 16"):
        scan.Scan(files, LENGTHS).search(own[0], 2)
    files[2].unlink()
    with pytest.raises(UserError, match=r"2\.npy: No such file"):
        scan.Scan(files, LENGTHS).search(own[0], 2)


def test_no_cluster_is_scanned(tmp_path):
    with pytest.raises(UserError, match="--ann scan: needs no database: drop --milvus"):
        library.build(None, {}, tmp_path, kind="scan", uri="http://x:1")
