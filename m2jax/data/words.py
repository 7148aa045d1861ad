# SPDX-License-Identifier: Apache-2.0
"""Which tokens of a text make up a word, from the pieces of its SentencePiece tokenizer.

English words begin at a piece with SentencePiece's space mark and go on through pieces without it.
Chinese has no spaces: there each piece is a word, as the unigram model found it. Punctuation and
unknown pieces stand alone. Masking a word hides all of its tokens.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import sentencepiece as spm
from jaxtyping import Bool, Int, Int8, Int32

from m2jax.config import UserError
from m2jax.data.source import HostBatch, Source
from m2jax.data.text import Tokenizer, tokenizer_from_dict

INSIDE, BEGINS, ALONE, OPENS = range(4)  # OPENS: a space mark by itself, part of what follows
SPACE = "\u2581"
WORD = "text_word"  # the entry of a batch

_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")


def piece_kinds(processor: spm.SentencePieceProcessor) -> Int8[np.ndarray, " pieces"]:
    """What each piece of a model does to the word before it."""
    found = np.empty(processor.vocab_size(), np.int8)
    for index in range(len(found)):
        special = processor.is_control(index) or processor.is_unknown(index)
        found[index] = ALONE if special else _kind(processor.id_to_piece(index))
    return found


def _kind(piece: str) -> int:
    text = piece.lstrip(SPACE)
    if not text:
        return OPENS
    if _HAN.search(text) or not any(c.isalnum() for c in text):
        return ALONE
    return BEGINS if piece.startswith(SPACE) else INSIDE


def word_index(
    ids: Int[np.ndarray, "*batch length"],
    mask: Bool[np.ndarray, "*batch length"],
    kinds: Int8[np.ndarray, " pieces"],
) -> Int32[np.ndarray, "*batch length"]:
    """The number, from 0, of the word each token belongs to; -1 at [CLS], the end and padding.

    Args:
        ids: [CLS], pieces, end, padding.
        mask: false at padding.
        kinds: of ``piece_kinds``.
    """
    content = mask.copy()
    content[..., 0] = False
    content[..., :-1] &= mask[..., 1:]  # the last token before the padding is the end
    content[..., -1] = False
    kind = kinds[ids]
    before = np.roll(kind, 1, axis=-1)
    before[..., 1] = ALONE  # a text begins with a word
    begins = (before != OPENS) & ((kind != INSIDE) | (before == ALONE))
    number = np.cumsum(begins & content, axis=-1, dtype=np.int32) - 1
    return np.where(content, number, np.int32(-1))


class WithWords:
    """A source whose batches also tell the word of every token.

    Args:
        source: any whose tokenizer runs on SentencePiece.

    Raises:
        UserError: its tokenizer does not.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self.assets: dict[str, Any] = source.assets
        self.parts: tuple[str, ...] = getattr(source, "parts", ())
        self.by_place: bool = getattr(source, "by_place", False)
        self._kinds = kinds_of(tokenizer_from_dict(source.assets["tokenizer"]))

    def batch(self, index: int, rows: slice) -> HostBatch:
        """The source's batch and ``text_word``."""
        batch = self._source.batch(index, rows)
        return {**batch, WORD: word_index(batch["text"], batch["text_mask"], self._kinds)}


def kinds_of(tokenizer: Tokenizer) -> Int8[np.ndarray, " pieces"]:
    """The kinds of a tokenizer's pieces.

    Raises:
        UserError: it has no SentencePiece model.
    """
    processor = getattr(tokenizer, "processor", None)
    if processor is None:
        raise UserError(
            "loss.masked_text.weight: the tokenizer does not tell its pieces: use GLM's or our "
            "own, or set it to 0"
        )
    return piece_kinds(processor)
