# SPDX-License-Identifier: Apache-2.0
"""SigLIP's tokenizer: canonical text, SentencePiece, an end token, padded with the same token.

Sources: ``canonicalize_text`` of google-research/big_vision (prompt_engineering.py), and
``SiglipTokenizer`` of transformers. They differ in one thing: big_vision, and open_clip with it,
turn an underscore into a space; transformers drops it like other punctuation.
"""

from __future__ import annotations

import base64
import string
from collections.abc import Sequence
from typing import Any

from m2jax.config import UserError
from m2jax.data.text import Tokens, open_model, padded, sentencepiece_fields, well_formed

END = "</s>"

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def canonical(text: str, *, underscore: str = "") -> str:
    """Lower case, without ASCII punctuation, single spaces; ``underscore`` takes the place of _."""
    kept = text.lower().replace("_", underscore).translate(_PUNCTUATION)
    return " ".join(kept.split())


class SiglipTokenizer:
    """Pieces and the end token, padded with it to ``max_len``; long texts lose their end.

    Args:
        model: bytes of the release's ``spiece.model``.
        max_len: tokens per text, the end included.
        underscore: what stands for an underscore: "" (transformers) or " " (big_vision).

    Raises:
        UserError: the bytes are no such model.
    """

    def __init__(self, model: bytes, max_len: int, underscore: str = "") -> None:
        self.model, self.max_len, self.underscore = model, max_len, underscore
        self._processor = open_model(model)
        self._end = self._processor.piece_to_id(END)
        if self._end == self._processor.unk_id():
            raise UserError(f"tokenizer: has no piece {END}: take spiece.model of the release")

    @property
    def vocab_size(self) -> int:
        """Number of pieces."""
        return self._processor.vocab_size()

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """Tokenises texts; the empty one is the end token alone."""
        plain = [canonical(well_formed(text), underscore=self.underscore) for text in texts]
        encoded = self._processor.encode(plain)
        lines = [[*pieces[: self.max_len - 1], self._end] for pieces in encoded]
        return padded(lines, self.max_len, self._end)

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "kind": "siglip",
            "model": base64.b64encode(self.model).decode(),
            "max_len": self.max_len,
            "underscore": self.underscore,
        }

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> SiglipTokenizer:
        """Inverse of ``to_dict``; see ``tokenizer_from_dict``."""
        return cls(*sentencepiece_fields(saved), underscore=str(saved.get("underscore", "")))
