# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from m2jax.config import UserError
from m2jax.data.siglip_text import SiglipTokenizer, canonical
from m2jax.data.text import open_model, tokenizer_from_dict, train_tokenizer

LINES = ["a photo of a red cat", "two dogs and one bird", "red bird on a photo", "cats dogs birds"]


@pytest.fixture(scope="module")
def model():
    return train_tokenizer(LINES * 3, 60)


def test_canonical_text():
    assert canonical("  A  Red-Cat,\n(two_birds)! ") == "a redcat twobirds"
    assert canonical("two_birds", underscore=" ") == "two birds"
    assert canonical("红色，猫。") == "红色，猫。"  # ASCII punctuation alone goes
    assert canonical("...") == ""


def test_pieces_then_end_then_the_same_as_padding(model):
    made = SiglipTokenizer(model, 8)
    processor = open_model(model)
    end = processor.piece_to_id("</s>")
    ids, mask = made(["A red cat!", "", "word " * 40])
    pieces = processor.encode("a red cat")
    assert ids[0].tolist() == [*pieces, end, *[end] * (7 - len(pieces))]
    assert mask.sum(1).tolist() == [len(pieces) + 1, 1, 8]
    assert ids[1].tolist() == [end] * 8
    assert ids[2, 7] == end
    assert end not in ids[2, :7]
    assert (ids.dtype, mask.dtype) == (np.int32, np.bool_)


def test_saved_and_back(model):
    made = SiglipTokenizer(model, 8, underscore=" ")
    again = tokenizer_from_dict(made.to_dict())
    assert again.to_dict() == made.to_dict()
    np.testing.assert_array_equal(again(["red_cat"]).ids, made(["red cat"]).ids)


def test_other_models_are_refused():
    with pytest.raises(UserError, match="no SentencePiece model"):
        SiglipTokenizer(b"not a model", 8)


def test_strange_texts_are_tokenised(model):
    ids, mask = SiglipTokenizer(model, 8)(["\ud800 x", "\x00", "</s> cat", "😀" * 10_000])
    assert ids.shape == mask.shape == (4, 8)
    assert mask.any(1).all()
