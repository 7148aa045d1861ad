# SPDX-License-Identifier: Apache-2.0
"""Text to token ids, on the SentencePiece runtime."""

from __future__ import annotations

import base64
import importlib
import io
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import sentencepiece as spm
from jaxtyping import Bool, Int32

from m2jax.config import UserError

PAD, UNK, CLS, END = 0, 1, 2, 3
MOST_TOKENS = 2**16  # of one text; a damaged file must not ask for endless memory


class Tokens(NamedTuple):
    """A batch of texts."""

    ids: Int32[np.ndarray, "batch length"]
    mask: Bool[np.ndarray, "batch length"]  # True for tokens, False for padding


def padded(lines: Sequence[Sequence[int]], length: int, pad: int) -> Tokens:
    """Lines of at most ``length`` ids as one batch, each filled up with ``pad``."""
    ids = np.full((len(lines), length), pad, np.int32)
    mask = np.zeros((len(lines), length), np.bool_)
    for row, line in enumerate(lines):
        ids[row, : len(line)] = line
        mask[row, : len(line)] = True
    return Tokens(ids, mask)


def until(ids: Sequence[int], end: int) -> list[int]:
    """The ids before the first ``end``."""
    return list(itertools.takewhile(lambda i: i != end, map(int, ids)))


@runtime_checkable  # the tests check types as they run
class Tokenizer(Protocol):
    """Texts to token ids; each kind of ``to_dict`` has its line in ``tokenizer_from_dict``."""

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """Tokenises texts; any string will do, the empty one included."""
        ...

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, its ``kind`` included."""
        ...


@runtime_checkable
class Speller(Tokenizer, Protocol):
    """A tokenizer that also goes the other way: what a captioner needs."""

    @property
    def end(self) -> int:
        """Id of the token that ends a text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids up to the end token."""
        ...


class SentencePieceTokenizer:
    """[CLS] pieces end, padded to ``max_len``; long texts lose their end.

    Args:
        model: bytes of a SentencePiece model made by ``train_tokenizer``.
        max_len: tokens per text, [CLS] and end included.

    Raises:
        UserError: the bytes are no such model.
    """

    def __init__(self, model: bytes, max_len: int) -> None:
        self.model, self.max_len = model, max_len
        self.processor = open_model(model)

    @property
    def vocab_size(self) -> int:
        """Number of pieces."""
        return self.processor.vocab_size()

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """Tokenises texts; any string will do, the empty one included."""
        encoded = self.processor.encode([well_formed(text) for text in texts])
        lines = [[CLS, *pieces[: self.max_len - 2], END] for pieces in encoded]
        return padded(lines, self.max_len, PAD)

    @property
    def end(self) -> int:
        """Id of the token that ends a text."""
        return END

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids up to the end token."""
        return self.processor.decode([i for i in until(ids, END) if i not in (PAD, CLS)])

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        model = base64.b64encode(self.model).decode()
        return {"kind": "sentencepiece", "model": model, "max_len": self.max_len}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> SentencePieceTokenizer:
        """Inverse of ``to_dict``; see ``tokenizer_from_dict``."""
        return cls(*sentencepiece_fields(saved))


# Kind in a checkpoint -> module and class; the class has from_dict, the inverse of to_dict.
_KINDS = {
    "sentencepiece": ("m2jax.data.text", "SentencePieceTokenizer"),
    "glm": ("m2jax.data.glm", "GLMTokenizer"),
    "siglip": ("m2jax.data.siglip_text", "SiglipTokenizer"),
    "tokenizer.json": ("m2jax.data.hf_text", "FastTokenizer"),
}


def tokenizer_from_dict(saved: dict[str, Any]) -> Tokenizer:
    """Inverse of ``to_dict``.

    Raises:
        UserError: an unknown kind or damaged bytes.
    """
    kind = saved.get("kind") if isinstance(saved, dict) else None
    if not isinstance(kind, str) or kind not in _KINDS:
        raise UserError(f"tokenizer: kind {kind!r} is unknown: update m2jax")
    module, name = _KINDS[kind]
    return getattr(importlib.import_module(module), name).from_dict(saved)


def open_model(model: bytes) -> spm.SentencePieceProcessor:
    """The runtime of a SentencePiece model.

    Raises:
        UserError: the bytes are no such model.
    """
    try:
        if not model:
            raise ValueError("it is empty")  # the runtime would take it for no model given
        return spm.SentencePieceProcessor(model_proto=model)
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(
            f"tokenizer: no SentencePiece model ({error}): take an undamaged one"
        ) from error


def well_formed(text: str) -> str:
    """The text with lone surrogates, which UTF-8 cannot hold, as question marks."""
    return text.encode("utf-8", "replace").decode()


def sentencepiece_fields(saved: dict[str, Any]) -> tuple[bytes, int]:
    """Model bytes and length of a saved tokenizer that runs on SentencePiece.

    Raises:
        UserError: they are missing or damaged.
    """
    try:
        model, max_len = base64.b64decode(saved["model"], validate=True), int(saved["max_len"])
        if not 2 <= max_len <= MOST_TOKENS:
            raise ValueError(f"max_len {max_len}")
        return model, max_len
    except (KeyError, ValueError, TypeError) as error:
        raise UserError("tokenizer: damaged: use another checkpoint") from error


def train_tokenizer(lines: Sequence[str], vocab_size: int) -> bytes:
    """Trains a unigram model (NFKC, lower case) whose first ids are pad, unk, [CLS] and end."""
    out = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=out,
        vocab_size=vocab_size,
        model_type="unigram",
        normalization_rule_name="nmt_nfkc_cf",
        character_coverage=1.0,
        hard_vocab_limit=False,
        pad_id=PAD,
        unk_id=UNK,
        bos_id=CLS,
        eos_id=END,
        pad_piece="<pad>",
        bos_piece="[CLS]",
        eos_piece="</s>",
        num_threads=1,
        minloglevel=2,
    )
    return out.getvalue()
