# SPDX-License-Identifier: Apache-2.0
"""The GLM rules on a small model of the same kind; the published strings are in tests/golden."""

import io

import numpy as np
import pytest
import sentencepiece as spm

from m2jax.config import UserError
from m2jax.data import glm
from m2jax.data.text import SentencePieceTokenizer, tokenizer_from_dict, train_tokenizer

SPECIAL = [glm.END, glm.CLS, glm.MASK, glm.UNK, *(f"<|blank_{i}|>" for i in range(10, 1, -1))]


@pytest.fixture(scope="module")
def model():
    """A BPE of single letters with GLM's special pieces and its normaliser."""
    out = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d e f g h i j"] * 5),
        model_writer=out,
        vocab_size=len(SPECIAL) + 24,
        model_type="bpe",
        hard_vocab_limit=False,
        user_defined_symbols=SPECIAL,
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    return out.getvalue()


def pieces(model, text, max_len=12):
    """What a text becomes, without padding, as pieces."""
    tokenizer = glm.GLMTokenizer(model, max_len)
    ids, mask = tokenizer([text])
    processor = spm.SentencePieceProcessor(model_proto=model)
    assert mask.sum() == max_len or (ids[0, mask.sum() :] == ids[0, mask.sum() - 1]).all()
    return [processor.id_to_piece(int(i)) for i in ids[0, : mask.sum()]]


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("", []),
        ("   [MASK]", ["[MASK]"]),
        ("a [MASK] b", ["▁a", "[MASK]", "▁b"]),
        ("[CLS][UNK]<|endoftext|>", ["[CLS]", "[UNK]", "<|endoftext|>"]),
        ("a" + " " * 4 + "b", ["▁a", "<|blank_4|>", "b"]),
        ("a" + " " * 11 + "b", ["▁a", "<|blank_10|>", "▁b"]),
        ("a" + " " * 13 + "b", ["▁a", "<|blank_10|>", "<|blank_3|>", "b"]),
        ("a\u3000\u3000b", ["▁a", "▁", "▁b"]),  # wide spaces become plain ones after the runs
        ("ａ", ["▁a"]),
        ("\ud800", ["▁", "<unk>"]),
    ],
)
def test_rules(model, text, content):
    assert pieces(model, text) == [glm.CLS, *content, glm.END]


def test_a_long_text_loses_its_start(model):
    long = " ".join("abcdefghij")
    assert pieces(model, long, 6) == [glm.CLS, "▁g", "▁h", "▁i", "▁j", glm.END]
    exact = pieces(model, long, 12)
    assert exact == [glm.CLS, *(f"▁{c}" for c in "abcdefghij"), glm.END]
    ids, mask = glm.GLMTokenizer(model, 12)(["a" * 10_000, "a" * 10_000 + " b"])
    assert mask.all()
    assert ids[0, -2] != ids[1, -2]


def test_a_saved_tokenizer_is_the_same(model):
    tokenizer = glm.GLMTokenizer(model, 8)
    again = tokenizer_from_dict(tokenizer.to_dict())
    assert isinstance(again, glm.GLMTokenizer)
    for ours, theirs in zip(tokenizer(["a  b", ""]), again(["a  b", ""]), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for change in ({"model": "%%"}, {"model": "AAAA"}, {"max_len": None}):
        with pytest.raises(UserError, match="tokenizer"):
            tokenizer_from_dict(tokenizer.to_dict() | change)


def test_only_a_release_directory_will_do(tmp_path):
    with pytest.raises(UserError, match=r"sp\.model: No such file"):
        glm.read(tmp_path, 52)
    (tmp_path / glm.FILE).write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="no SentencePiece model"):
        glm.read(tmp_path, 52)
    (tmp_path / glm.FILE).write_bytes(train_tokenizer(["a b c d"] * 9, 20))
    with pytest.raises(UserError, match=r"no piece <\|endoftext\|>, so it is not GLM's"):
        glm.read(tmp_path, 52)


def test_no_string_is_too_odd_for_the_other_tokenizer():
    tokenizer = SentencePieceTokenizer(train_tokenizer(["a b c d"] * 9, 20), 6)
    assert tokenizer(["\ud800", "\0", "", "a" * 10_000]).mask.sum(1).max() == 6
