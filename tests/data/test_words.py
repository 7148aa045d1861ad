# SPDX-License-Identifier: Apache-2.0
"""Words of both languages from the pieces of a tokenizer."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2jax.config import UserError
from m2jax.data import glm, words
from m2jax.data.text import SentencePieceTokenizer, train_tokenizer
from tests.golden.fixtures import shared

LINES = [
    "the cat sat on a wall",
    "walls and cats",
    "catwalk, on the sun",
    "猫在墙上",
    "太阳在房子的左边",
]
TOKENIZER = SentencePieceTokenizer(train_tokenizer(LINES, 70), 24)
KINDS = words.piece_kinds(TOKENIZER.processor)


def spelled(tokenizer, kinds, text):
    """The words of a text as lists of pieces, and every token's number."""
    tokens = tokenizer([text])
    index = words.word_index(tokens.ids, tokens.mask, kinds)[0]
    found = [
        "".join(
            tokenizer.processor.id_to_piece(int(i))
            for i, w in zip(tokens.ids[0], index, strict=True)
            if w == number
        )
        for number in range(index.max() + 1)
    ]
    return [word.replace("\u2581", "") for word in found], index


def test_english_words_are_whole_and_punctuation_stands_alone():
    found, index = spelled(TOKENIZER, KINDS, "the catwalk, on walls")
    assert found == ["the", "catwalk", ",", "on", "walls"]
    pieces = TOKENIZER.processor.encode("catwalk")
    assert len(pieces) > 1  # or nothing was joined
    assert (index == 1).sum() == len(pieces)


def test_each_chinese_piece_is_a_word():
    found, _ = spelled(TOKENIZER, KINDS, "猫在房子的左边")
    pieces = [
        p.replace("\u2581", "") for p in TOKENIZER.processor.encode("猫在房子的左边", out_type=str)
    ]
    assert found == [p for p in pieces if p]
    assert "".join(found) == "猫在房子的左边"
    mixed, _ = spelled(TOKENIZER, KINDS, "猫cats on墙")
    assert mixed[0] == "猫"
    assert mixed[1:3] == ["cats", "on"]
    assert mixed[-1] == "墙"


@settings(deadline=None, max_examples=80)
@given(st.text(alphabet="thecatswlkon ,猫在墙上🙂é", max_size=40))
def test_every_token_of_a_text_is_in_a_word_and_nothing_else_is(text):
    tokens = TOKENIZER([text])
    index = words.word_index(tokens.ids, tokens.mask, KINDS)[0]
    length = int(tokens.mask.sum())
    assert index[0] == -1
    assert (index[length - 1 :] == -1).all()
    inside = index[1 : length - 1]
    assert (inside >= 0).all()
    assert (np.diff(inside) >= 0).all()  # words lie one behind the other
    assert sorted(set(inside.tolist())) == list(range(len(set(inside.tolist()))))


def test_a_text_that_fills_its_room_keeps_its_end_unmasked():
    tokens = TOKENIZER(["cat " * 30])
    assert tokens.mask.all()
    index = words.word_index(tokens.ids, tokens.mask, KINDS)[0]
    assert index[-1] == -1
    assert index[-2] == index.max() >= 10


def test_a_text_whose_start_was_cut_begins_with_a_word():
    """GLM's long texts lose their start: the first piece may be the rest of a word."""
    kinds = np.array([words.ALONE, words.INSIDE, words.BEGINS, words.OPENS], np.int8)
    ids = np.array([[3, 1, 1, 2, 1, 3, 0, 1, 0]])  # the first is [CLS], whatever its kind
    index = words.word_index(ids, np.ones_like(ids, bool), kinds)
    assert index.tolist() == [[-1, 0, 0, 1, 1, 2, 2, 3, -1]]


def test_batches_of_several_languages_keep_their_shape():
    tokens = [TOKENIZER(["a cat", "walls"]), TOKENIZER(["猫", "在墙上"])]
    ids, mask = (np.stack([t[i] for t in tokens], axis=1) for i in (0, 1))
    index = words.word_index(ids, mask, KINDS)
    assert index.shape == ids.shape
    for row in range(2):
        for language in range(2):
            one = words.word_index(ids[row, language], mask[row, language], KINDS)
            np.testing.assert_array_equal(index[row, language], one)


def test_glms_pieces_tell_words_too():
    tokenizer = glm.read(shared("data/m2-tokenizer"), 52)
    kinds = words.kinds_of(tokenizer)
    english, _ = spelled(tokenizer, kinds, "an extraordinarily unphotographable cat, of course")
    assert english == ["an", "extraordinarily", "unphotographable", "cat", ",", "of", "course"]
    chinese, _ = spelled(tokenizer, kinds, "一只可爱的小猫在沙发上睡觉")
    assert "".join(chinese) == "一只可爱的小猫在沙发上睡觉"
    assert 4 <= len(chinese) < 13  # pieces of several characters: words, not characters
    assert {"沙发上", "睡觉"} < set(chinese)


def test_a_source_tells_words_and_a_tokenizer_without_pieces_is_refused():
    class Source:
        assets = {"tokenizer": TOKENIZER.to_dict()}  # noqa: RUF012

        def batch(self, index, rows):
            tokens = TOKENIZER(["a cat", "walls", "on"][rows])
            return {"text": tokens.ids[:, None], "text_mask": tokens.mask[:, None]}

    batch = words.WithWords(Source()).batch(0, slice(1, 3))
    expected = words.word_index(batch["text"], batch["text_mask"], KINDS)
    np.testing.assert_array_equal(batch["text_word"], expected)
    assert batch["text_word"].shape == (2, 1, 24)
    with pytest.raises(UserError, match="does not tell its pieces: use GLM's or our own"):
        words.kinds_of(object())  # type: ignore[arg-type]
