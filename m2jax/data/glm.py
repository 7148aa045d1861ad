# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of the published M2-Encoders: GLM-10B-Chinese's pieces under the release's rules.

The rules are those of spec section 10 (transformers 4.17, the release's pinned version). The pieces
come from the ``sp.model`` in the user's copy of the release; it is not ours to ship.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from m2jax.config import UserError
from m2jax.data.text import Tokens, open_model, padded, sentencepiece_fields, until, well_formed

FILE = "sp.model"  # its name in a release directory
END, CLS, MASK, UNK = "<|endoftext|>", "[CLS]", "[MASK]", "[UNK]"  # the end is also the padding
BLANKS = range(10, 1, -1)  # lengths of runs of spaces that have a piece, longest first

_LITERAL = re.compile("(" + "|".join(map(re.escape, (END, CLS, MASK, UNK))) + ")")


class GLMTokenizer:
    """[CLS] pieces end, padded with the end's id to ``max_len``; long texts lose their start.

    Args:
        model: bytes of the release's ``sp.model``.
        max_len: tokens per text, [CLS] and end included.

    Raises:
        UserError: the bytes are no such model.
    """

    def __init__(self, model: bytes, max_len: int) -> None:
        self.model, self.max_len = model, max_len
        self.processor = open_model(model)
        self._ids = {piece: self.processor.piece_to_id(piece) for piece in (END, CLS, MASK, UNK)}
        missing = [p for p, i in self._ids.items() if i == self.processor.unk_id()]
        if missing:
            raise UserError(
                f"tokenizer: has no piece {missing[0]}, so it is not GLM's: "
                f"take {FILE} of the release"
            )

    @property
    def vocab_size(self) -> int:
        """Number of pieces."""
        return self.processor.vocab_size()

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """Tokenises texts of any length; the empty one is [CLS] and end alone."""
        room, end, lines = self.max_len - 2, self._ids[END], []
        for text in texts:
            content = self._content(text)
            lines.append([self._ids[CLS], *content[max(0, len(content) - room) :], end])
        return padded(lines, self.max_len, end)

    def _content(self, text: str) -> list[int]:
        """Ids of a text without [CLS], end and padding."""
        parts = _LITERAL.split(well_formed(text))  # text, literal, text, literal, ..., text
        ids: list[int] = []
        for index, part in enumerate(parts):
            if index % 2:
                ids.append(self._ids[part])
                continue
            # Whitespace beside a literal goes: transformers 4.17 strips it, 4.44 no longer does.
            part = part.lstrip() if index else part
            part = part.rstrip() if index < len(parts) - 1 else part
            if part:
                ids += self.processor.encode(_blanks(part))
        return ids

    @property
    def end(self) -> int:
        """Id of the token that ends a text."""
        return self._ids[END]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids up to the end token; runs of spaces come back as spaces."""
        text = self.processor.decode([i for i in until(ids, self.end) if i != self._ids[CLS]])
        return re.sub(r"<\|blank_(\d+)\|>", lambda found: " " * int(found[1]), text)

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        model = base64.b64encode(self.model).decode()
        return {"kind": "glm", "model": model, "max_len": self.max_len}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> GLMTokenizer:
        """Inverse of ``to_dict``; see ``tokenizer_from_dict``."""
        return cls(*sentencepiece_fields(saved))


def read(directory: Path, max_len: int) -> GLMTokenizer:
    """The tokenizer of a release directory.

    Raises:
        UserError: it holds no readable ``sp.model`` of GLM's.
    """
    try:
        model = (directory / FILE).read_bytes()
    except OSError as error:
        raise UserError(
            f"{directory / FILE}: {error.strerror}: name the release's directory, which holds it"
        ) from None
    return GLMTokenizer(model, max_len)


def _blanks(text: str) -> str:
    """Runs of 2 to 10 spaces as their pieces; U+0020 alone counts."""
    for length in BLANKS:
        text = text.replace(" " * length, f"<|blank_{length}|>")
    return text
