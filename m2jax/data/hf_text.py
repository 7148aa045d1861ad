# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of CLIP, Chinese-CLIP and SigLIP 2, on Hugging Face's ``tokenizers`` (optional).

Whatever files a release has, it ends as the text of one ``tokenizer.json``: rules and vocabulary.
Length and padding are ours: a fixed length, as the authors' own code has it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from m2jax.config import UserError
from m2jax.data.text import Tokens, padded, well_formed

START_TEXT, END_TEXT = "<|startoftext|>", "<|endoftext|>"  # CLIP's
# CLIP's words: the contractions, runs of letters, single digits, runs of anything else.
_CLIP_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


class FastTokenizer:
    """The rules of a ``tokenizer.json``, cut and padded on the right to ``max_len``.

    Args:
        rules: text of the ``tokenizer.json``; the special tokens come from its post-processor.
        max_len: tokens per text, special ones included; what is cut is the end of the text.
        pad_id: what fills the rest.

    Raises:
        UserError: ``tokenizers`` is not installed, or cannot read the rules.
    """

    def __init__(self, rules: str, max_len: int, pad_id: int) -> None:
        self.rules, self.max_len, self.pad_id = rules, max_len, pad_id
        self._tokenizer = _open(rules)
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_len)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return self._tokenizer.get_vocab_size()

    @property
    def pad_token(self) -> str:
        """Text of the token that fills the rest."""
        return self._tokenizer.id_to_token(self.pad_id)

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """Tokenises texts; the empty one is the special tokens alone."""
        encoded = self._tokenizer.encode_batch([*map(well_formed, texts)])
        return padded([line.ids for line in encoded], self.max_len, self.pad_id)

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "kind": "tokenizer.json",
            "rules": self.rules,
            "max_len": self.max_len,
            "pad_id": self.pad_id,
        }

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> FastTokenizer:
        """Inverse of ``to_dict``; see ``tokenizer_from_dict``."""
        try:
            return cls(str(saved["rules"]), int(saved["max_len"]), int(saved["pad_id"]))
        except (KeyError, ValueError, TypeError) as error:
            raise UserError("tokenizer: damaged: use another checkpoint") from error


def library() -> Any:
    """The ``tokenizers`` module.

    Raises:
        UserError: it is not installed.
    """
    try:
        import tokenizers  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            "tokenizers: not installed, and this model's text needs it: pip install tokenizers"
        ) from None
    return tokenizers


def clip_rules(vocab: Path, merges: Path) -> str:
    """The ``tokenizer.json`` of CLIP from its ``vocab.json`` and ``merges.txt``.

    Raises:
        UserError: a file is missing or damaged, or lacks CLIP's special tokens.
    """
    tk = library()
    ids = _vocabulary(vocab)
    lines = read_text(merges).splitlines()
    pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    for token in (START_TEXT, END_TEXT):
        if token not in ids:
            raise UserError(f"{vocab}: has no {token}: take the vocabulary of a CLIP release")
    try:
        model = tk.models.BPE(
            vocab=ids,
            merges=pairs,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            fuse_unk=False,
            unk_token=END_TEXT,
        )
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{merges}: does not fit {vocab.name} ({error}): take both anew") from None
    tokenizer = tk.Tokenizer(model)
    pre, norm = tk.pre_tokenizers, tk.normalizers
    tokenizer.normalizer = norm.Sequence(
        [norm.NFC(), norm.Replace(tk.Regex(r"\s+"), " "), norm.Lowercase()]
    )
    words = pre.Split(tk.Regex(_CLIP_WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre.Sequence([words, pre.ByteLevel(add_prefix_space=False)])
    _wrap(tokenizer, START_TEXT, END_TEXT, (START_TEXT, END_TEXT))
    return tokenizer.to_str()


def bert_rules(vocab: Path, *, lower: bool) -> str:
    """The ``tokenizer.json`` of BERT from its ``vocab.txt``, one piece per line.

    Raises:
        UserError: the file is missing, no UTF-8, or lacks BERT's special tokens.
    """
    tk = library()
    ids = {piece: index for index, piece in enumerate(read_text(vocab).rstrip("\n").split("\n"))}
    for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]"):
        if token not in ids:
            raise UserError(f"{vocab}: has no {token}: take vocab.txt of the release")
    tokenizer = tk.Tokenizer(tk.models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = tk.normalizers.BertNormalizer(lowercase=lower)
    tokenizer.pre_tokenizer = tk.pre_tokenizers.BertPreTokenizer()
    special = [token for token in ("[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]") if token in ids]
    _wrap(tokenizer, "[CLS]", "[SEP]", special)
    return tokenizer.to_str()


def cleaned(rules: str, *, punctuation: bool) -> str:
    """The same rules after lower case, and after SigLIP's removal of punctuation if it is to go.

    SigLIP 2 was trained on lower case, which its published rules (Gemma's) leave out. The removal
    is big_vision's ``canonicalize_text``, as open_clip applies it.
    """
    tk = library()
    tokenizer = _open(rules)
    norm = tk.normalizers
    steps = [norm.Lowercase()]
    if not punctuation:
        ascii_marks = tk.Regex(r"[!-/:-@\[-`{-~]")
        steps += [norm.Replace("_", " "), norm.Replace(ascii_marks, "")]
        steps += [norm.Replace(tk.Regex(r"\s+"), " "), norm.Strip()]
    if tokenizer.normalizer is not None:
        steps.append(tokenizer.normalizer)
    tokenizer.normalizer = norm.Sequence(steps)
    return tokenizer.to_str()


def token_id(rules: str, token: str, where: str) -> int:
    """Id of a token by its text.

    Raises:
        UserError: unreadable rules, or no such token.
    """
    found = _open(rules).token_to_id(token)
    if found is None:
        raise UserError(f"{where}: has no token {token!r}: take the files of one release")
    return found


def read_text(path: Path) -> str:
    """A file of a release.

    Raises:
        UserError: it is missing or no UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: copy it from the release") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8: take an undamaged copy") from None


def _open(rules: str) -> Any:
    """The library's tokenizer of these rules."""
    tokenizers = library()
    try:
        return tokenizers.Tokenizer.from_str(rules)
    except Exception as error:  # the library raises bare Exception
        raise UserError(
            f"tokenizer: no readable tokenizer.json ({error}): take an undamaged one"
        ) from None


def _vocabulary(path: Path) -> dict[str, int]:
    try:
        ids = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}): take an undamaged copy") from None
    if not isinstance(ids, dict) or not all(type(value) is int for value in ids.values()):
        raise UserError(f"{path}: no vocabulary: take the vocab.json of the release")
    return ids


def _wrap(tokenizer: Any, first: str, last: str, special: Sequence[str]) -> None:
    """Puts special tokens around every text; all in ``special`` count as one token in a text."""
    tokenizer.add_special_tokens(list(special))
    ends = [(token, tokenizer.token_to_id(token)) for token in (first, last)]
    tokenizer.post_processor = library().processors.TemplateProcessing(
        single=f"{first} $A {last}", special_tokens=ends
    )
