# SPDX-License-Identifier: Apache-2.0
"""Which labels a sentence names: the noun filter that gives sentences their targets.

As TaI-DPT does it, longer names are looked for first and what they cover is gone, so "hot dog" is
no dog. There words are brought to WordNet's lemmas; here plurals are told by the rules of English
spelling, which need no data and miss irregular ones beyond a short list.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence

from m2jax.config import UserError
from m2jax.tasks.labels.vocabulary import Vocabulary

_WORD = re.compile(r"[^\W_]+")
_IRREGULAR = {
    **{"people": "person", "men": "man", "women": "woman", "children": "child", "mice": "mouse"},
    **{"geese": "goose", "feet": "foot", "teeth": "tooth", "knives": "knife", "leaves": "leaf"},
    **{"wolves": "wolf", "loaves": "loaf", "oxen": "ox", "shelves": "shelf", "scarves": "scarf"},
}


class Finder:
    """Finds labels of a vocabulary; its time is the sentence's length, not the number of labels.

    Args:
        vocabulary: the labels.
        where: what errors call their source.

    Raises:
        UserError: names of two labels differ in spaces or punctuation alone, which sentences are
            read without (``hot dog`` and ``hot-dog``): none could name one and not the other.
    """

    def __init__(self, vocabulary: Vocabulary, where: str = "labels") -> None:
        self._english: dict[tuple[str, ...], int] = {}
        self._chinese: dict[tuple[str, ...], int] = {}
        written: dict[tuple[str, ...], str] = {}
        for label, names in enumerate(vocabulary.names):
            for language, places in (("en", self._english), ("zh", self._chinese)):
                for name in names.get(language, ()):
                    units = tuple(words(name) if language == "en" else _letters(name))
                    if places.setdefault(units, label) != label:
                        raise UserError(
                            f"{where}: {written[units]:.60} and {name:.60} differ in spaces or "
                            "punctuation alone, which sentences are read without: write them as "
                            f"one label ({written[units]:.60}|{name:.60}), or rename one"
                        )
                    written[units] = name

    def __call__(self, sentence: str, language: str) -> frozenset[int]:
        """Labels that a sentence of a language names."""
        if language == "zh":
            return frozenset(_longest(_letters(sentence), self._chinese, lambda units: [units]))
        return frozenset(_longest(words(sentence), self._english, _singular))


def words(text: str) -> list[str]:
    """Words in lower case, apart from punctuation."""
    return _WORD.findall(_clean(text))


def _letters(text: str) -> list[str]:
    """Of Chinese, which has no spaces."""
    return list(_clean(text).replace(" ", ""))


def _longest(
    units: Sequence[str],
    names: dict[tuple[str, ...], int],
    forms: Callable[[tuple[str, ...]], Iterable[tuple[str, ...]]],
) -> Iterator[int]:
    """Labels of the longest names first; a unit belongs to one name only."""
    free = [True] * len(units)
    for size in range(min(max(map(len, names), default=0), len(units)), 0, -1):
        for start in range(len(units) - size + 1):
            stop = start + size
            if not all(free[start:stop]):
                continue
            for form in forms(tuple(units[start:stop])):
                if form in names:
                    free[start:stop] = [False] * size
                    yield names[form]
                    break


def _singular(units: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The words as they are, then with the last one as the singular it may be the plural of."""
    yield units
    *rest, last = units
    if last in _IRREGULAR:
        yield (*rest, _IRREGULAR[last])
    if last.endswith("ies") and len(last) > 4:
        yield (*rest, f"{last[:-3]}y")
    if last.endswith(("ses", "xes", "zes", "ches", "shes", "oes")):
        yield (*rest, last[:-2])
    if last.endswith("s") and not last.endswith("ss"):
        yield (*rest, last[:-1])


def _clean(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()
