# SPDX-License-Identifier: Apache-2.0
"""A scan of all stored features: exact, by video and frame, and as Milvus gives it."""

import numpy as np
import pytest

from m2jax.config import UserError
from m2jax.tasks.video import features, library, scan, search, vectors

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
        # More than are stored: -1 behind. Without the first video, and one between.
        for limit, without in ((4, -1), (9, 0), (60, 2), (60, -1)):
            expected = index.search(queries, limit, "exact", without)
            found = scan.Scan(files, LENGTHS).search(queries, limit, without=without)
            assert without < 0 or without not in found.video
            np.testing.assert_array_equal(found.video, expected.video)
            np.testing.assert_array_equal(found.frame, expected.frame)
            np.testing.assert_allclose(found.score, expected.score, atol=1e-5)
    finally:
        index.close()
    assert (found.video[:, sum(LENGTHS) :] == -1).all()


def test_a_video_that_is_left_out_takes_no_place(tmp_path):
    """A still video's own frames are its nearest: they would hide the copy of it."""
    still = unit(np.random.default_rng(3), 1).repeat(30, axis=0)
    copy = unit(np.random.default_rng(4), 20)
    copy[5:17] = still[:12]
    for number, rows in enumerate((still, copy)):
        features.write(library.features_file(tmp_path, number), rows)
    videos = [library.Video(name, name, [0, 0], n, True) for name, n in (("a", 30), ("b", 20))]
    stored = library.Library("m", "f", 1.0, "scan", "", videos)
    found = search.search(
        stored,
        library.open_index(tmp_path, stored),
        still,
        folder=tmp_path,
        method="DP",
        nearest=12,
        leave_out="a",
    )
    assert {match.video for match in found} == {"b"}
    assert found[0].reference_start < 8 < 14 < found[0].reference_end  # where exactly is DP's
    alone = scan.Scan([library.features_file(tmp_path, 0)], [30])
    assert (alone.search(still, 3, without=0).video == -1).all()


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
