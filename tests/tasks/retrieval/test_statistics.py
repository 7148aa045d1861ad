# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from m2jax.config import UserError
from m2jax.tasks.retrieval import statistics


def features(seed=0, n=60, dim=8, classes=5):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, dim)).astype(np.float32), rng.integers(0, classes, n)


def test_batches_give_what_the_whole_gives():
    x, y = features()
    whole = statistics.class_statistics(lambda: [(x, y)], 6)
    parts = [*zip(np.array_split(x, 7), np.array_split(y, 7), strict=True)]
    streamed = statistics.class_statistics(lambda: iter(parts), 6)
    np.testing.assert_allclose(streamed.centres, whole.centres, atol=1e-12)
    np.testing.assert_allclose(streamed.radius_max, whole.radius_max, atol=1e-12)
    np.testing.assert_array_equal(streamed.counts, whole.counts)
    assert whole.counts[5] == 0  # a class without images
    assert not whole.old_classes().known[5]


def test_a_class_of_one_image_bounds_nothing():
    x, _ = features(n=3)
    found = statistics.class_statistics(lambda: [(x, np.array([0, 1, 1]))], 2)
    assert found.counts.tolist() == [1, 2]
    assert found.old_classes().known.tolist() == [False, True]


def test_outliers_are_left_out_from_four_images_on():
    rising = np.array([1.0, 1.1, 1.2, 9.0])
    assert statistics.without_outliers(rising[:3]).tolist() == [1.0, 1.1, 1.2]
    # Quartiles by index: [1] and [3], so 9 is its own quartile and stays.
    assert statistics.without_outliers(rising)[-1] == 9.0
    longer = np.array([1.0, 1.1, 1.2, 1.3, 1.4, 9.0])
    assert statistics.without_outliers(longer)[-1] == 1.4
    assert statistics.without_outliers(10 - longer[::-1]).tolist() == (10 - longer[4::-1]).tolist()


def test_input_that_cannot_be():
    x, y = features()
    bad = x.copy()
    bad[3, 3] = np.nan
    with pytest.raises(UserError, match="not a number"):
        statistics.class_statistics(lambda: [(bad, y)], 5)
    with pytest.raises(UserError, match=r"labels 0\.\.4 do not fit 3"):
        statistics.class_statistics(lambda: [(x, y)], 3)
    with pytest.raises(UserError, match="no features"):
        statistics.class_statistics(lambda: [], 5)
    passes = iter([[(x, y)], [(x[1:], y[1:])]])
    with pytest.raises(UserError, match="saw different images"):
        statistics.class_statistics(lambda: next(passes), 5)
