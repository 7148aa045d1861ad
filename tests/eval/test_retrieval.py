# SPDX-License-Identifier: Apache-2.0
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2jax.config import UserError
from m2jax.eval import metrics, retrieval
from tests.eval.pictures import unit


def features(seed, images, captions, dim=6, steps=None):
    """Images, captions of each, and features with ties where ``steps`` is given."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, captions + 1, images)
    rows = [rng.normal(size=(n, dim)) for n in (images, counts.sum())]
    if steps:
        rows = [np.round(x * steps) / steps for x in rows]
    return *[x.astype(np.float32) for x in rows], [["c"] * n for n in counts]


def matrix(rows, width):
    right = np.zeros((len(rows), width), bool)
    for row, each in enumerate(rows):
        right[row, list(each)] = True
    return right


@pytest.mark.slow
@given(
    seed=st.integers(0, 999),
    images=st.integers(2, 40),
    tile=st.sampled_from([3, 16, 64]),
    steps=st.sampled_from([None, 1]),
)
@settings(max_examples=40, deadline=None)
def test_tiles_rank_as_the_whole_matrix_does(seed, images, tile, steps):
    """Ties among them: coarse features have many, and they count against the query."""
    pictures, texts, captions = features(seed, images, 4, steps=steps)
    answers = retrieval.standard(captions)
    scores = pictures @ texts.T  # small integers in float32: exact whatever the order of sums
    if steps is None:
        scores = np.asarray(jax.numpy.matmul(pictures, texts.T, precision="highest"))
    for queries, items, rows, table in (
        (pictures, texts, answers.of_image, scores),
        (texts, pictures, answers.of_text, scores.T),
    ):
        expected = metrics.first_right(table, matrix(rows, len(items)))
        found = retrieval.ranks(queries, items, rows, tile=tile)
        if steps is not None:
            np.testing.assert_array_equal(found, expected)
        else:
            assert (found == expected).mean() >= 0.99  # a last bit may swap two neighbours


def test_a_query_without_an_answer_is_never_found():
    one = np.eye(3, dtype=np.float32)
    assert retrieval.ranks(one, one, [[0], [], [2]], tile=2).tolist() == [0, 3, 0]


def test_features_that_are_no_numbers_are_refused():
    one = np.eye(3, dtype=np.float32)
    with pytest.raises(UserError, match="not a number"):
        retrieval.ranks(one * np.nan, one, [[0], [1], [2]])
    with pytest.raises(UserError, match="one picture or caption alone"):
        retrieval.score(one[:1], one[:1], retrieval.standard([["a"]]))


CAPTIONS = [["A dog", "two"], ["a dog"], ["“x”", "two"]]


def test_the_release_looks_captions_up_by_their_text():
    """As its script does: repeated texts keep their last row alone, and any picture that bears
    them. Worked by hand from that script."""
    found = retrieval.m2_release(CAPTIONS)
    # rows: 0 a dog, 1 two, 2 a dog, 3 "x", 4 two
    assert list(found.of_image) == [[2, 4], [2], [3, 4]]
    assert list(found.of_text) == [[0, 1], [0, 2], [0, 1], [2], [0, 2]]
    plain = retrieval.standard(CAPTIONS)
    assert list(plain.of_image) == [[0, 1], [2], [3, 4]]
    assert list(plain.of_text) == [[0], [0], [1], [2], [2]]
    assert retrieval.release_text("“A” B") == '"a" b'


@given(st.lists(st.lists(st.sampled_from("abcdA"), min_size=1, max_size=4), min_size=2, max_size=8))
@settings(max_examples=60, deadline=None)
def test_the_release_protocol_equals_a_reading_of_its_script(captions):
    """Its two 0/1 tables, made the plain way: captions by text, the last row of each text."""
    texts, number, bearers = [], {}, {}
    for image, each in enumerate(captions):
        for text in each:
            texts.append(text.lower())
            number[text.lower()] = len(texts) - 1
            bearers.setdefault(text.lower(), set()).add(image)
    found = retrieval.m2_release(captions)
    for image, each in enumerate(captions):
        assert set(found.of_image[image]) == {number[text.lower()] for text in each}
    for row, text in enumerate(texts):
        assert set(found.of_text[row]) == bearers[text]


def test_a_repeated_caption_costs_the_release_its_earlier_rows():
    """The trap itself: with perfect features the release's figure is below 1, the standard's is
    below 1 too (a tie is lost), and only distinct captions are perfect."""
    pictures = unit(np.eye(3, 4) + 0.1)
    texts = np.concatenate([pictures, pictures[:1]])
    captions = [["same"], ["b"], ["c", "same"]]
    texts = pictures[[0, 1, 2, 0]]  # the last caption is the first's text
    standard = retrieval.score(pictures, texts, retrieval.standard(captions))
    release = retrieval.score(pictures, texts, retrieval.m2_release(captions))
    assert standard["t2i_r1"].share.value == 3 / 4  # the second "same" finds the first picture
    assert release["t2i_r1"].share.value == 1  # which bears it
    assert standard["i2t_r1"].share.value == 2 / 3  # the equal text of another picture ties
    assert release["i2t_r1"].share.value == 2 / 3  # row 0 never counts, and ties row 3


def test_the_longest_caption_of_each_picture():
    captions = [["a b", "a b c", "x y z"], ["猫", "一只猫"], ["one"]]
    assert retrieval.longest(captions) == [1, 4, 5]


def test_figures_of_known_ranks_and_their_examples():
    pictures, texts, captions = features(3, 60, 3)
    found = retrieval.score(unit(pictures), unit(texts), retrieval.standard(captions))
    values = [found[f"{way}_r{k}"].share.value for way in ("i2t", "t2i") for k in (1, 5, 10)]
    np.testing.assert_allclose(found["mean_recall"].share.value, np.mean(values), rtol=1e-12)
    for key, figure in found.items():
        assert figure.share.low <= figure.share.value <= figure.share.high, key
        assert figure.examples is not None
        assert len(figure.examples) == 60
    sums = found["t2i_r5"].examples.sum(0)[0]  # pyright: ignore
    assert sums[1] == len(texts)
    np.testing.assert_allclose(sums[0] / sums[1], found["t2i_r5"].share.value, rtol=1e-6)


def test_captions_of_one_picture_are_drawn_together():
    """Ten copies of each caption say nothing new: the interval must not get narrower for them."""
    pictures, texts, _ = features(5, 80, 1)
    once = retrieval.score(unit(pictures), unit(texts), retrieval.standard([["c"]] * 80))
    tenfold = retrieval.score(
        unit(pictures), unit(np.repeat(texts, 10, axis=0)), retrieval.standard([["c"] * 10] * 80)
    )
    spans = [s["t2i_r10"].share.high - s["t2i_r10"].share.low for s in (once, tenfold)]
    np.testing.assert_allclose(*spans, rtol=1e-6)


def test_a_million_by_a_million_needs_no_matrix():
    """XLA's own account of the compiled program at that size; nothing is allocated."""
    million, dim, tile = 2**20, 768, retrieval.TILE
    shape = jax.ShapeDtypeStruct
    lowered = retrieval._tiles.lower(
        shape((tile, dim), "float32"),
        shape((million // tile, tile, dim), "float32"),
        shape((tile, 5), "int32"),
        million,
    )
    memory = lowered.compile().memory_analysis()
    assert memory.argument_size_in_bytes < 1.01 * million * dim * 4 + 2**25
    assert memory.temp_size_in_bytes < 2**28  # a matrix of logits would take 4 TB
