# SPDX-License-Identifier: Apache-2.0
"""The labels a user names, in one or two languages, checked before anything is trained on them."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from m2jax.config import UserError
from m2jax.data.text import Tokens
from m2jax.eval.emoji import Encoder
from m2jax.eval.sets import coco_names
from m2jax.eval.sets.records import is_chinese

LANGUAGES = ("en", "zh")
FILE_BYTES = 2**26
MOST_LABELS = 100_000
BATCH = 512  # texts tokenised at once


@dataclass(frozen=True)
class Vocabulary:
    """Labels in their order."""

    names: tuple[Mapping[str, tuple[str, ...]], ...]  # of each by language; the first is written

    def __len__(self) -> int:
        return len(self.names)

    @property
    def languages(self) -> tuple[str, ...]:
        """Those that every label has a name in."""
        return tuple(lang for lang in LANGUAGES if all(lang in each for each in self.names))

    def title(self, label: int) -> str:
        """How a label is shown: its first name, English before Chinese."""
        each = self.names[label]
        return each[next(lang for lang in LANGUAGES if lang in each)][0]

    def of(self, labels: Sequence[int]) -> Vocabulary:
        """Some of the labels."""
        return Vocabulary(tuple(self.names[label] for label in labels))

    def to_list(self) -> list[dict[str, list[str]]]:
        """What a trained adapter keeps."""
        return [{lang: list(names) for lang, names in each.items()} for each in self.names]


def read(path: Path) -> Vocabulary:
    """A file of labels: one per line, its names in both languages apart by a tab.

    ``dog|puppy<TAB>狗``: further names of a label follow a bar; the first is the one that sentences
    use. A line of one language is enough.

    Raises:
        UserError: the file cannot be read, or a label is none; the message names the line.
    """
    try:
        if path.stat().st_size > FILE_BYTES:
            raise UserError(f"--labels {path}: over {FILE_BYTES:,} bytes: name the right file")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"--labels {path}: {error.strerror}: check the path") from None
    except UnicodeDecodeError:
        raise UserError(f"--labels {path}: not UTF-8: save it in that encoding") from None
    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    if not text.strip():
        raise UserError(f"--labels {path}: holds no label: write one per line")
    rows = [_names(line, f"--labels {path}: line {n}") for n, line in enumerate(lines, 1)]
    return checked(rows, f"--labels {path}", "line")


def checked(
    rows: Sequence[Mapping[str, Sequence[str]]], where: str = "labels", unit: str = "label"
) -> Vocabulary:
    """A vocabulary of names by language.

    Args:
        rows: of each label its names by language.
        where: what errors call the source.
        unit: what they call a row, counted from 1.

    Raises:
        UserError: none or one alone, far too many, an empty or unprintable name, or a name that two
            labels bear, in one language or as each other's translation.
    """
    if not rows:
        raise UserError(f"{where}: holds no label: name at least two")
    if not 2 <= len(rows) <= MOST_LABELS:
        raise UserError(f"{where}: {len(rows):,} labels: name 2 to {MOST_LABELS:,}")
    seen: dict[str, int] = {}
    for number, row in enumerate(rows, 1):
        if not row or not set(row) <= set(LANGUAGES) or not all(map(_is_list, row.values())):
            raise UserError(f"{where}: {unit} {number}: has no name in en or zh: give it one")
        for name in (name for names in row.values() for name in names):
            _check_name(name, f"{where}: {unit} {number}")
            key = folded(name)
            if seen.setdefault(key, number) != number:
                raise UserError(
                    f"{where}: {unit} {number}: {name!r} is a name of {unit} {seen[key]} too: "
                    "remove one of the two"
                )
    _check_translations(rows, where, unit)
    return Vocabulary(tuple({lang: tuple(names) for lang, names in row.items()} for row in rows))


def cut_off(model: Encoder, texts: Sequence[str]) -> Bool[np.ndarray, " texts"]:
    """Which texts reach to the end of the model's text length.

    A tokenizer cuts what is too long without a word; a text that doubled gives the same tokens
    is cut, or has no room to spare.
    """
    found = [np.zeros(0, np.bool_)]
    for first in range(0, len(texts), BATCH):
        part = texts[first : first + BATCH]
        once, twice = (
            Tokens(*model.tokenize(t)) for t in (part, [f"{text} {text}" for text in part])
        )
        found.append((np.asarray(once.ids) == np.asarray(twice.ids)).all(axis=1))
    return np.concatenate(found)


def check_length(model: Encoder, vocabulary: Vocabulary, where: str = "labels") -> None:
    """Refuses a name that leaves no room for a sentence in the model's text length.

    Raises:
        UserError: the message names the label.
    """
    every = [name for each in vocabulary.names for names in each.values() for name in names]
    full = cut_off(model, every)
    if full.any():
        name = every[int(full.argmax())]
        length = Tokens(*model.tokenize([name])).ids.shape[1]
        raise UserError(
            f"{where}: {name[:60]!r}: longer than the model's text ({length} tokens): write a "
            "shorter name"
        )


def folded(name: str) -> str:
    """What makes two names one: width, case and spaces do not count."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def _names(line: str, where: str) -> dict[str, list[str]]:
    """The names on a line by language, which their letters tell."""
    found: dict[str, list[str]] = {}
    for column in line.split("\t"):
        names = [name.strip() for name in column.split("|")]
        if not all(names):
            raise UserError(f"{where}: an empty name: remove it")
        # One Chinese character tells: T恤 is no English name, though half its letters are Latin.
        language = "zh" if any(is_chinese(letter) for letter in column) else "en"
        if language in found:
            raise UserError(
                f"{where}: two columns in one language: write name<TAB>名字, or further names "
                "after a bar (dog|puppy)"
            )
        found[language] = names
    return found


def _is_list(names: object) -> bool:
    """Whether these are names, some, and not one whose letters would be taken for names."""
    return isinstance(names, Sequence) and not isinstance(names, str) and len(names) > 0


def _check_name(name: str, where: str) -> None:
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"{where}: an empty name: remove it")
    if not name.isprintable():
        raise UserError(f"{where}: {name[:60]!r}: holds characters that are not printed: mend it")
    if not any(c.isalnum() for c in name):
        raise UserError(
            f"{where}: {name[:60]!r}: holds no letter or digit: name the label in words"
        )


def _check_translations(rows: Sequence[Mapping[str, Sequence[str]]], where: str, unit: str) -> None:
    """Refuses ``dog`` and ``狗`` as two labels, as far as COCO's eighty names tell."""
    places = {folded(name): n for n, name in _every(rows)}
    for english, chinese in coco_names.CHINESE.items():
        first, second = places.get(english), places.get(folded(chinese))
        if first is not None and second is not None and first != second:
            raise UserError(
                f"{where}: {unit} {second}: {chinese!r} means {english!r} of {unit} {first}: "
                f"write them as one label, {english}<TAB>{chinese}"
            )


def _every(rows: Sequence[Mapping[str, Sequence[str]]]) -> Iterator[tuple[int, str]]:
    for number, row in enumerate(rows, 1):
        for names in row.values():
            yield from ((number, name) for name in names)
