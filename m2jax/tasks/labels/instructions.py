# SPDX-License-Identifier: Apache-2.0
"""What a language model is asked: instruction templates for sentences with given labels.

TAI-Adapter instructs a language model with "multi-label instruction-following" prompts; its wording
is not known, and this is ours. A change of wording raises ``VERSION``, so that answers to another
wording are not taken for answers to this one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

from m2jax.tasks.labels.vocabulary import Vocabulary

VERSION = 1

SYSTEM = {
    "en": (
        "You write short captions of pictures. You answer with JSON and nothing else: "
        '{"captions": ["...", "..."]}'
    ),
    "zh": '你为图片写简短的说明。只用JSON回答，不写别的：{"captions": ["……", "……"]}',
}
# {n} captions that name exactly {x}; a template is drawn for every request.
TEMPLATES = {
    "en": (
        "Write {n} different captions of pictures that show all of these things and nothing else "
        "that has a name: {x}. Use each of the names as it is written.",
        "Imagine {n} photos. Every one shows: {x}. Describe each photo in one sentence that "
        "contains all of these names, and name no other object.",
        "For each of {n} drawings with {x}, give one plain sentence a person would write under it. "
        "All names must occur in it, word for word.",
    ),
    "zh": (
        "为{n}张不同的图片各写一句说明，图中有以下所有事物，没有别的：{x}。每个名称都要照写。",
        "想象{n}张照片，每张都有：{x}。每张用一句话描述，包含所有这些名称，不提其他物体。",
        "有{n}幅画着{x}的画，请为每幅写一句平实的说明，所有名称都要原样出现。",
    ),
}


class Prompt(NamedTuple):
    """One request."""

    number: int
    labels: tuple[int, ...]
    language: str
    captions: int  # asked for
    system: str
    user: str


def prompt(
    vocabulary: Vocabulary,
    labels: Sequence[int],
    language: str,
    *,
    number: int,
    captions: int,
) -> Prompt:
    """The request for captions of these labels; template by turns.

    Names are written as JSON strings: one with a quote or a line break in it stays one name.
    """
    names = [vocabulary.names[label][language][0] for label in labels]
    listed = ("、" if language == "zh" else ", ").join(
        json.dumps(name, ensure_ascii=False) for name in names
    )
    template = TEMPLATES[language][number % len(TEMPLATES[language])]
    user = template.replace("{n}", str(captions)).replace("{x}", listed)
    return Prompt(number, tuple(labels), language, captions, SYSTEM[language], user)
