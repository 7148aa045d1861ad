# SPDX-License-Identifier: Apache-2.0
"""The table of an import's check, and what counts as failed."""

import numpy as np
import pytest

from m2jax.checkpoint.convert.check import LIMIT, CheckFailed, compare, table

UNIT = np.array([[0.6, 0.8], [1.0, 0.0]])


def rows_of(after, **options):
    return compare({"image": UNIT}, {"image": after, "not asked for": UNIT}, **options)


def test_the_worst_row_of_a_batch_counts():
    [row] = rows_of(UNIT + np.array([[0, 0], [0, 3e-5]]))
    assert row.probe == "image"
    assert row.max_abs == pytest.approx(3e-5)
    assert row.cosine == pytest.approx(1, abs=1e-8)
    [turned] = rows_of(np.array([[0.6, 0.8], [0.0, 1.0]]))
    assert turned.cosine == 0


@pytest.mark.parametrize(
    ("change", "passed"),
    [(0.9 * LIMIT, True), (1.1 * LIMIT, False), (np.nan, False), (np.inf, False)],
)
def test_the_limit(change, passed):
    with np.errstate(invalid="ignore"):
        [row] = rows_of(UNIT + change)
    assert row.passed == passed
    assert ("ok" if passed else "FAIL") in table([row])


def test_a_row_that_informs_never_fails():
    [row] = rows_of(UNIT + 1, limit=np.inf)
    assert row.passed
    assert table([row]).endswith("  -")


def test_the_error_names_the_worst_row():
    [good], [bad] = rows_of(UNIT), rows_of(UNIT + 1)
    for worst in (bad, bad._replace(max_abs=np.nan)):
        error = CheckFailed([good, worst._replace(probe="text"), good])
        assert str(error).startswith("the check failed: text: ")
        assert len(error.rows) == 3
