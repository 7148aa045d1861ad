# SPDX-License-Identifier: Apache-2.0
"""Packed rows hold every text once and whole."""

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2jax.config import UserError
from m2jax.data.packing import packed
from tests.data import own_files

TOKENIZER = own_files.TOKENIZER  # of up to 8 tokens


def unpacked(rows):
    """The texts' ids, as tuples."""
    found = []
    for row in rows:
        for segment in range(1, row["text_segment_ids"].max() + 1):
            here = row["text_segment_ids"] == segment
            found.append(tuple(row["text"][here]))
            np.testing.assert_array_equal(row["text_positions"][here], np.arange(here.sum()))
            assert np.ptp(np.flatnonzero(here)) == here.sum() - 1  # in one piece
        assert (row["text"][row["text_segment_ids"] == 0] == 0).all()
    return found


@given(
    st.lists(st.sampled_from(["thing", "东西", "thing 东西 thing", "", "1 2 3"]), max_size=30),
    st.integers(8, 40),
    st.integers(1, 5),
)
@settings(max_examples=25, deadline=None)
def test_every_text_is_there_once_and_whole(texts, length, bins):
    rows = list(packed(texts, TOKENIZER, length=length, bins=bins))
    assert all(row["text"].shape == (length,) for row in rows)
    ids, mask = TOKENIZER(texts) if texts else (np.zeros((0, 8)), np.zeros((0, 8)))
    expected = [tuple(i[m]) for i, m in zip(ids, mask.astype(bool), strict=True)]
    assert sorted(unpacked(rows)) == sorted(expected)


def test_little_is_wasted_and_it_goes_on_where_it_was():
    data = grain.MapDataset.source(["东西", "thing", "东西 1"]).shuffle(seed=1).repeat(100)
    rows = packed(data, TOKENIZER, length=64, bins=8)
    whole = list(rows)
    used = np.mean([(row["text_segment_ids"] > 0).mean() for row in whole])
    assert used > 0.9
    iterator = iter(rows)
    [next(iterator) for _ in range(5)]
    state = iterator.get_state()
    again = iter(rows)
    again.set_state(state)
    np.testing.assert_array_equal(next(again)["text"], whole[5]["text"])


def test_rows_shorter_than_a_text_are_refused():
    with pytest.raises(UserError, match="texts of up to 8 tokens into rows of 7: raise it"):
        packed(["x"], TOKENIZER, length=7)
