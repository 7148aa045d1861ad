# SPDX-License-Identifier: Apache-2.0
"""CLIP's, BERT's and Gemma-like rules on tiny vocabularies (needs the library ``tokenizers``)."""

import json
import sys

import numpy as np
import pytest

from m2jax.config import UserError
from m2jax.data import hf_text
from m2jax.data.text import tokenizer_from_dict

torch_lane = pytest.mark.torch  # the environment that has the library

BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "猫", "红", "a", "cat", "##s", "photo"]


@pytest.fixture
def library():
    return pytest.importorskip("tokenizers", reason="needs tokenizers: make test-torch")


def clip_files(folder):
    """A byte-level vocabulary with two merges."""
    letters = "abcdeghiloprt.!'s0123"
    pieces = [*letters, *(f"{x}</w>" for x in letters), "ca", "cat</w>"]
    pieces += [hf_text.START_TEXT, hf_text.END_TEXT]
    (folder / "vocab.json").write_text(json.dumps({p: i for i, p in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    return pieces


def bert_file(folder):
    (folder / "vocab.txt").write_text("\n".join(BERT) + "\n", encoding="utf-8")
    return folder / "vocab.txt"


@torch_lane
def test_clip_rules(tmp_path, library):
    pieces = clip_files(tmp_path)
    rules = hf_text.clip_rules(tmp_path / "vocab.json", tmp_path / "merges.txt")
    made = hf_text.FastTokenizer(rules, 8, 0)
    start, end = len(pieces) - 2, len(pieces) - 1
    ids, mask = made(["  CAT  12", "", "cat " * 20])
    at = pieces.index
    assert ids[0].tolist() == [start, at("cat</w>"), at("1</w>"), at("2</w>"), end, 0, 0, 0]
    assert ids[1].tolist() == [start, end, 0, 0, 0, 0, 0, 0]
    assert ids[2].tolist() == [start, *[at("cat</w>")] * 6, end]
    assert mask.sum(1).tolist() == [5, 2, 8]
    assert hf_text.token_id(rules, hf_text.END_TEXT, "x") == end


@torch_lane
def test_bert_rules(tmp_path, library):
    made = hf_text.FastTokenizer(hf_text.bert_rules(bert_file(tmp_path), lower=True), 8, 0)
    ids, mask = made(["红猫Cats", "zebra", "[MASK]"])
    assert ids[0].tolist() == [2, 6, 5, 8, 9, 3, 0, 0]  # each Chinese character is a word
    assert ids[1].tolist() == [2, 1, 3, 0, 0, 0, 0, 0]
    assert ids[2].tolist() == [2, 4, 3, 0, 0, 0, 0, 0]
    assert mask.sum(1).tolist() == [6, 3, 3]
    cased = hf_text.FastTokenizer(hf_text.bert_rules(bert_file(tmp_path), lower=False), 8, 0)
    assert cased(["Cat"]).ids[0].tolist()[:3] == [2, 1, 3]


@torch_lane
def test_cleaning_comes_first_and_all_is_saved(tmp_path, library):
    rules = hf_text.bert_rules(bert_file(tmp_path), lower=False)
    made = hf_text.FastTokenizer(hf_text.cleaned(rules, punctuation=False), 6, 0)
    again = tokenizer_from_dict(made.to_dict())
    np.testing.assert_array_equal(again([" A, Cat_PHOTO! "]).ids[0], [2, 7, 8, 10, 3, 0])
    lowered = hf_text.FastTokenizer(hf_text.cleaned(rules, punctuation=True), 6, 0)
    np.testing.assert_array_equal(lowered(["A Cat!"]).ids[0], [2, 7, 8, 1, 3, 0])
    assert (made.vocab_size, made.pad_token) == (len(BERT), "[PAD]")


@torch_lane
def test_strange_texts_are_tokenised(tmp_path, library):
    made = hf_text.FastTokenizer(hf_text.bert_rules(bert_file(tmp_path), lower=True), 6, 0)
    assert made(["\ud800", "\x00", "猫" * 10_000, "[CLS]"]).ids.shape == (4, 6)


@torch_lane
def test_damaged_files_are_refused_by_name(tmp_path, library):
    clip_files(tmp_path)
    vocab, merges = tmp_path / "vocab.json", tmp_path / "merges.txt"
    merges.write_text("x y\n")
    with pytest.raises(UserError, match=r"merges\.txt: does not fit vocab\.json"):
        hf_text.clip_rules(vocab, merges)
    vocab.write_text("[1, 2]")
    with pytest.raises(UserError, match=r"vocab\.json: no vocabulary"):
        hf_text.clip_rules(vocab, merges)
    vocab.write_text("{")
    with pytest.raises(UserError, match=r"vocab\.json: not JSON"):
        hf_text.clip_rules(vocab, merges)
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match=r"has no \[PAD\]"):
        hf_text.bert_rules(tmp_path / "vocab.txt", lower=True)
    with pytest.raises(UserError, match=r"none\.txt: No such file"):
        hf_text.bert_rules(tmp_path / "none.txt", lower=True)
    with pytest.raises(UserError, match=r"no readable tokenizer\.json"):
        hf_text.FastTokenizer("{}", 8, 0)


def test_without_the_library_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match="pip install tokenizers"):
        hf_text.FastTokenizer("{}", 8, 0)


def test_damaged_savings_are_refused():
    with pytest.raises(UserError, match="damaged"):
        tokenizer_from_dict({"kind": "tokenizer.json"})
