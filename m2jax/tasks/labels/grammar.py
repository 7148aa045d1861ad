# SPDX-License-Identifier: Apache-2.0
"""Training sentences without a language model: a bilingual grammar, the same for the same seed.

The wording is ours. A sentence is kept only if the noun filter reads exactly the labels out of it
that were put in, so a frame that happens to name another label is passed over.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from m2jax.tasks.labels.mentions import Finder
from m2jax.tasks.labels.vocabulary import Vocabulary

MOST_LABELS = 4  # in one sentence
TRIES = 8  # frames tried before the bare list

# {x} is the list of names; which of a frame's words matter to a model is not known, so they vary.
FRAMES = {
    "en": (
        *("{x}", "a picture of {x}", "a photo of {x}.", "there is {x} here.", "this shows {x}."),
        *("{x}, seen from nearby", "{x} in one scene", "an image with {x}", "we can see {x}."),
        *("somebody drew {x}", "{x} on a white ground", "{x} side by side", "look at {x}!"),
        *("a close view of {x}", "{x} outside on a sunny day", "{x} in a quiet place"),
    ),
    "zh": (
        *("{x}", "{x}的图片", "一张{x}的照片。", "这里有{x}。", "图中显示{x}。", "近处看到的{x}"),
        *("同一场景中的{x}", "我们可以看到{x}。", "有人画了{x}", "白色背景上的{x}", "并排的{x}"),
        *("看，{x}！", "晴天户外的{x}", "安静的地方有{x}", "{x}在一起"),
    ),
}
# Between two names, and before the last of several.
JOINS = {
    "en": (
        *((", ", " and "), (" next to ", " and "), (" and ", " and "), (" with ", " and ")),
        *((" beside ", " with "), (", ", ", "), (" near ", " and ")),
    ),
    "zh": (("、", "和"), ("旁边有", "和"), ("和", "和"), ("与", "及"), ("，", "，"), ("、", "、")),
}


class Sentence(NamedTuple):
    """A training example."""

    text: str
    labels: tuple[int, ...]  # ascending
    language: str


def plan(
    classes: int, count: int, rng: np.random.Generator, *, most: int = MOST_LABELS
) -> Iterator[tuple[int, ...]]:
    """``count`` sets of 1 to ``most`` labels, in which labels come up equally often up to one.

    Labels are shuffled and cut into sets, again and again: what occurs together is chance.
    """
    queue: list[int] = []
    for _ in range(count):
        size = min(int(rng.integers(1, most + 1)), classes)
        while len(queue) < size:
            # What is in the set already comes last, so no set has a label twice.
            queue += sorted(rng.permutation(classes).tolist(), key=set(queue).__contains__)
        taken, queue = queue[:size], queue[size:]
        yield tuple(sorted(taken))


def write(
    vocabulary: Vocabulary,
    finder: Finder,
    labels: Sequence[int],
    language: str,
    rng: np.random.Generator,
) -> Sentence | None:
    """A sentence that names exactly these labels; ``None`` where names hide each other."""
    wanted = frozenset(labels)
    names = [vocabulary.names[label][language] for label in rng.permutation(list(labels))]
    frames = FRAMES[language]
    for frame in [*rng.permutation(len(frames))[:TRIES], 0]:
        between, last = JOINS[language][rng.integers(len(JOINS[language]))]
        said = [each[rng.integers(len(each))] for each in names]
        listed = said[0] if len(said) == 1 else between.join(said[:-1]) + last + said[-1]
        if len(said) == 2:
            listed = between.join(said)
        text = frames[frame].replace("{x}", listed)
        if finder(text, language) == wanted:
            return Sentence(text, tuple(sorted(wanted)), language)
    return None


def sentences(
    vocabulary: Vocabulary,
    languages: Sequence[str],
    count: int,
    *,
    seed: int,
    most: int = MOST_LABELS,
) -> list[Sentence]:
    """About ``count`` sentences, in the languages by turns; fewer where names hide each other."""
    rng = np.random.default_rng(seed)
    finder = Finder(vocabulary)
    found = []
    for number, labels in enumerate(plan(len(vocabulary), count, rng, most=most)):
        language = languages[number % len(languages)]
        made = write(vocabulary, finder, labels, language, rng)
        if made is not None:
            found.append(made)
    return found
