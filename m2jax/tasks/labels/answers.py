# SPDX-License-Identifier: Apache-2.0
"""From a language model's answer to sentences. An answer is hostile until every check has passed.

What is taken is plain text of one line that names exactly the labels asked for, by our own reading
of it (``mentions``) and not by what the answer says of itself.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from m2jax.eval.sets.records import is_chinese
from m2jax.tasks.labels.grammar import Sentence
from m2jax.tasks.labels.instructions import Prompt
from m2jax.tasks.labels.mentions import Finder
from m2jax.tasks.labels.vocabulary import folded

MOST_CHARACTERS = 300  # of a sentence
MOST_CAPTIONS = 256  # taken from one answer

# What belongs in no caption: addresses, markup, code, talk about the task or to a model.
_FOREIGN = re.compile(
    r"https?://|www\.|[<>{}\[\]\\`|]|\$\(|&#?\w+;"
    r"|\b(?:ignore|disregard)\b.*\b(?:instruction|prompt|above|previous)"
    r"|\bas an? (?:ai|language model|assistant)\b|\bsystem prompt\b|\b(?:i'm sorry|i cannot)\b"
    r"|\b(?:caption|sentence) \d+\b"
    r"|作为(?:一个)?(?:AI|人工智能|语言模型)|忽略.*(?:指令|提示)|系统提示",
    re.IGNORECASE,
)


class Refused(NamedTuple):
    """What was not taken, and why."""

    text: str
    why: str


class Read(NamedTuple):
    """What an answer gave."""

    taken: list[Sentence]
    refused: list[Refused]


def read(answer: str, prompt: Prompt, finder: Finder) -> Read:
    """The sentences of an answer that passed; the others with the reason."""
    captions = _captions(answer)
    if isinstance(captions, str):
        return Read([], [Refused(answer[:MOST_CHARACTERS], captions)])
    taken, refused = list[Sentence](), list[Refused]()
    for caption in captions[:MOST_CAPTIONS]:
        why = refusal(caption, prompt, finder)
        if why:
            refused.append(Refused(str(caption)[:MOST_CHARACTERS], why))
        else:
            text = unicodedata.normalize("NFC", caption).strip()
            taken.append(Sentence(text, tuple(sorted(prompt.labels)), prompt.language))
    if len(captions) > MOST_CAPTIONS:
        refused.append(Refused(f"{len(captions) - MOST_CAPTIONS} more", "too many captions"))
    return Read(taken, refused)


def refusal(caption: Any, prompt: Prompt, finder: Finder) -> str:
    """Why a caption is not taken; empty if it is."""
    if not isinstance(caption, str):
        return "no text"
    text = caption.strip()
    if not text:
        return "empty"
    if len(text) > MOST_CHARACTERS:
        return "too long"
    if not text.isprintable() or any(unicodedata.category(c) in ("Cf", "Co", "Cn") for c in text):
        return "characters that are not printed"
    if _FOREIGN.search(unicodedata.normalize("NFKC", text)):  # wide letters read as plain ones
        return "no caption"
    if is_chinese(text) != (prompt.language == "zh") and any(c.isalpha() for c in text):
        return "another language"
    named = finder(text, prompt.language)
    if missing := set(prompt.labels) - named:
        return f"{len(missing)} labels missing"
    return f"{len(named) - len(prompt.labels)} other labels" if named - set(prompt.labels) else ""


def without_duplicates(sentences: Sequence[Sentence]) -> Iterator[tuple[Sentence, bool]]:
    """Each sentence, and whether it says what one before it said, but for case and punctuation."""
    seen: set[tuple[str, str]] = set()
    for sentence in sentences:
        key = sentence.language, "".join(c for c in folded(sentence.text) if c.isalnum())
        yield sentence, key in seen
        seen.add(key)


def _captions(answer: str) -> list[Any] | str:
    """The captions that an answer lists, or why it is none."""
    text = answer.strip()
    if text.startswith("```") and text.endswith("```") and "\n" in text:
        # By hand: a pattern with two runs of space takes hours for a megabyte of line breaks.
        text = text[3:-3].removeprefix("json").strip()
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):  # the latter of brackets nested without end
        return "no JSON"
    if isinstance(content, dict):
        content = content.get("captions")
    return content if isinstance(content, list) else "no list of captions"
