# SPDX-License-Identifier: Apache-2.0
"""Caption metrics against the COCO evaluation's own scorers, and their intervals."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2jax.config import UserError
from m2jax.eval import captions
from m2jax.eval import metrics as metrics_lib
from tests.golden.fixtures import HERE

GOLDEN = json.loads((HERE / "captions" / "captions.json").read_text(encoding="utf-8"))
LANGUAGES = ("en", "zh")
TEXTS = st.lists(st.lists(st.sampled_from("abc"), max_size=6), min_size=1, max_size=5)


def words_of(golden):
    own = [text.split() for text in golden["words"]["candidates"]]
    return own, [[text.split() for text in texts] for texts in golden["words"]["references"]]


@pytest.mark.parametrize("language", LANGUAGES)
def test_each_image_scores_what_the_coco_evaluation_gives(language):
    golden = GOLDEN[language]
    own, references = words_of(golden)
    found = captions.cider(own, references)
    np.testing.assert_allclose(found, golden["cider_each"], rtol=1e-12, atol=1e-12)
    found = captions.rouge_l(own, references)
    np.testing.assert_allclose(found, golden["rouge_l_each"], rtol=1e-12)
    parts = captions.bleu_parts(own, references)
    np.testing.assert_allclose(captions.bleu(parts)[:, 3], golden["bleu4_each"], rtol=1e-12)
    np.testing.assert_allclose(captions.bleu(parts.sum(0)), golden["bleu"], rtol=1e-12)


@pytest.mark.parametrize("language", LANGUAGES)
def test_texts_score_as_their_words_do_and_lie_in_their_intervals(language):
    golden = GOLDEN[language]
    own, references = words_of(golden)
    assert [captions.split(text, language) for text in golden["candidates"]] == own
    for texts, words in zip(golden["references"], references, strict=True):
        assert [captions.split(text, language) for text in texts] == words
    found = captions.score(golden["candidates"], golden["references"], language=language)
    expected = golden["cider"], golden["bleu"][3], golden["rouge_l"]
    for share, value in zip(found, expected, strict=True):
        np.testing.assert_allclose(share.value, value, rtol=1e-12)
        assert share.low < share.value < share.high


def test_chinese_is_split_into_characters_and_latin_runs_stay_whole():
    assert captions.split("LED灯：3个，iPhone 15", "zh") == ["led", "灯", "3", "个", "iphone", "15"]
    assert captions.split("The cook's x-ray, 3 cups_", "en") == [
        *("the", "cook's", "x", "ray", "3", "cups")
    ]


@settings(deadline=None, max_examples=60)
@given(TEXTS)
def test_the_words_of_a_reference_are_perfect_and_none_are_nothing(texts):
    references = [[text] for text in texts]
    own = captions.rouge_l(texts, references)
    np.testing.assert_allclose(own, [float(bool(text)) for text in texts], rtol=1e-12)
    nothing = [[] for _ in texts]
    for found in (captions.rouge_l(nothing, references), captions.cider(nothing, references)):
        np.testing.assert_array_equal(found, 0)
    assert captions.bleu(captions.bleu_parts(nothing, references).sum(0)).max() < 1e-3
    if all(len(text) >= 4 for text in texts):
        sums = captions.bleu_parts(texts, references).sum(0)
        np.testing.assert_allclose(captions.bleu(sums), 1, rtol=1e-8)


def test_an_interval_is_the_spread_of_resampled_sums():
    """Against a plain loop over samples drawn with replacement, to the noise of a thousand."""
    parts = np.random.default_rng(1).random((40, 2))
    ratio = lambda sums: sums[..., 0] / sums[..., 1]  # noqa: E731
    found = metrics_lib.bootstrap(parts, ratio)
    rng = np.random.default_rng(2)
    drawn = [ratio(parts[rng.integers(40, size=40)].sum(0)) for _ in range(4000)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    np.testing.assert_allclose(found.value, parts[:, 0].sum() / parts[:, 1].sum(), rtol=1e-12)
    np.testing.assert_allclose(found[1:], [low, high], atol=0.1 * (high - low))
    assert metrics_lib.bootstrap(np.ones(3)) == (1, 1, 1)


@pytest.mark.parametrize(
    ("own", "references"), [([], []), (["a"], []), (["a"], [[]]), (["a", "b"], [["a"]])]
)
def test_an_image_without_a_reference_is_refused(own, references):
    with pytest.raises(UserError, match="every image at least one reference"):
        captions.score(own, references, language="en")
