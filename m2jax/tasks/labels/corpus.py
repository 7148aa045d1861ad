# SPDX-License-Identifier: Apache-2.0
"""The sentences a training uses, in a folder: every prompt, every answer, what was taken, and why.

Answers are appended one by one, so a run that was stopped goes on with the next prompt. Sentences
are read out of the stored answers anew each time: what a mended check would refuse is gone then.
"""

from __future__ import annotations

import collections
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from m2jax.config import UserError
from m2jax.eval.emoji import Encoder
from m2jax.tasks.labels import answers, grammar, instructions, vocabulary
from m2jax.tasks.labels.answers import Refused
from m2jax.tasks.labels.client import Writer
from m2jax.tasks.labels.grammar import Sentence
from m2jax.tasks.labels.instructions import Prompt
from m2jax.tasks.labels.mentions import Finder
from m2jax.tasks.labels.vocabulary import Vocabulary

SETTINGS, EXCHANGES, SENTENCES, REFUSED, REPORT = (
    *("settings.json", "exchanges.jsonl", "sentences.jsonl", "refused.jsonl", "report.json"),
)
CAPTIONS = 8  # asked for in one request


@dataclass(frozen=True)
class Order:
    """What is to be written."""

    vocabulary: Vocabulary
    languages: Sequence[str]
    sentences: int  # about so many; fewer where answers are refused
    seed: int = 0
    most: int = grammar.MOST_LABELS  # labels in one sentence


@dataclass(frozen=True)
class Corpus:
    """What there is to train on."""

    sentences: list[Sentence]
    report: dict[str, Any]


def offline(order: Order) -> Corpus:
    """Sentences of the grammar; nothing is asked and nothing stored."""
    made = grammar.sentences(
        order.vocabulary, order.languages, order.sentences, seed=order.seed, most=order.most
    )
    return _finished(order, made, [], "grammar")


def written(
    order: Order, folder: Path, writer: Writer, say: Callable[[str], None] = lambda line: None
) -> Corpus:
    """Sentences of a language model, stored in a folder as they come.

    Args:
        order: what is wanted.
        folder: new, or that of the same order.
        writer: answers the prompts.
        say: told how far it is.

    Raises:
        UserError: the folder holds another order, or the writer fails; what it answered stays.
    """
    _check_settings(order, folder, writer.name)
    prompts = list(_prompts(order))
    known = _exchanges(folder / EXCHANGES, prompts)
    with (folder / EXCHANGES).open("a", encoding="utf-8") as file:
        for prompt in prompts[len(known) :]:
            answer = writer(prompt)
            row = {"number": prompt.number, "prompt": prompt._asdict(), "answer": answer}
            file.write(json.dumps(row, ensure_ascii=True) + "\n")
            file.flush()
            os.fsync(file.fileno())
            known.append(answer)
            say(f"{len(known)}/{len(prompts)} answers")
    finder = Finder(order.vocabulary)
    taken, refused = list[Sentence](), list[Refused]()
    for prompt, answer in zip(prompts, known, strict=True):
        found = answers.read(answer, prompt, finder)
        taken += found.taken
        refused += found.refused
    corpus = _finished(order, taken, refused, writer.name)
    _write_lines(folder / SENTENCES, [s._asdict() for s in corpus.sentences])
    _write_lines(folder / REFUSED, [r._asdict() for r in refused])
    _replace(folder / REPORT, json.dumps(corpus.report, ensure_ascii=False, indent=1) + "\n")
    return corpus


def uncut(model: Encoder, words: Vocabulary, corpus: Corpus) -> Corpus:
    """The sentences that a model reads to their end, and the report on them.

    Of a longer one the tokenizer drops the end, and the labels named there: the sentence's targets
    would say what its features cannot.

    Raises:
        UserError: none is left.
    """
    cut = vocabulary.cut_off(model, [s.text for s in corpus.sentences])
    kept = [s for s, gone in zip(corpus.sentences, cut, strict=True) if not gone]
    if not kept:
        raise UserError(
            "sentences: all are longer than the model's text: write shorter names, or take another "
            "model"
        )
    return Corpus(kept, corpus.report | {"cut_off": int(cut.sum())} | balance(words, kept))


def balance(words: Vocabulary, sentences: Sequence[Sentence]) -> dict[str, Any]:
    """How often each label is named, and which are not named at all."""
    counts = collections.Counter(label for s in sentences for label in s.labels)
    each = np.array([counts[label] for label in range(len(words))])
    return {
        "sentences": len(sentences),
        "by_language": dict(collections.Counter(s.language for s in sentences)),
        "labels_per_sentence": dict(sorted(collections.Counter(map(_size, sentences)).items())),
        "named_least": int(each.min()),
        "named_median": float(np.median(each)),
        "named_most": int(each.max()),
        "never_named": [words.title(i) for i in np.flatnonzero(each == 0).tolist()],
    }


def _size(sentence: Sentence) -> int:
    return len(sentence.labels)


def _finished(
    order: Order, sentences: Sequence[Sentence], refused: Sequence[Refused], source: str
) -> Corpus:
    """Without duplicates, with its report."""
    kept = [s for s, again in answers.without_duplicates(sentences) if not again]
    report = {
        "source": source,
        "duplicates": len(sentences) - len(kept),
        "refused": dict(collections.Counter(r.why for r in refused)),
        **balance(order.vocabulary, kept),
    }
    if not kept:
        reasons = ", ".join(f"{why}: {n}" for why, n in report["refused"].items()) or "none came"
        raise UserError(f"sentences: none of {source} can be used ({reasons}): see {REFUSED}")
    return Corpus(kept, report)


def _prompts(order: Order) -> list[Prompt]:
    rng = np.random.default_rng(order.seed)
    count = -(-order.sentences // CAPTIONS)
    plan = grammar.plan(len(order.vocabulary), count, rng, most=order.most)
    return [
        instructions.prompt(
            order.vocabulary,
            labels,
            order.languages[number % len(order.languages)],
            number=number,
            captions=CAPTIONS,
        )
        for number, labels in enumerate(plan)
    ]


def _check_settings(order: Order, folder: Path, source: str) -> None:
    """Makes the folder, or finds the same order in it."""
    settings = {
        "source": source,
        "instructions": instructions.VERSION,
        "labels": order.vocabulary.to_list(),
        "languages": list(order.languages),
        "sentences": order.sentences,
        "seed": order.seed,
        "most": order.most,
    }
    file = folder / SETTINGS
    if file.exists():
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: damaged ({error}): name another folder") from error
        if found != settings:
            differs = [
                k for k in settings if not isinstance(found, dict) or found.get(k) != settings[k]
            ]
            raise UserError(
                f"{folder}: holds sentences of another order ({', '.join(differs)} differ): name "
                "another folder"
            )
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        empty = not any(folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror}): name another") from error
    if not empty:
        raise UserError(f"{folder}: holds other files: name a new folder")
    _replace(file, json.dumps(settings, ensure_ascii=False, indent=1) + "\n")


def _exchanges(file: Path, prompts: Sequence[Prompt]) -> list[str]:
    """The stored answers in order; a last line cut off in writing is removed."""
    if not file.exists():
        return []
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with file.open("r+b") as opened:
            opened.truncate(len(whole))
    found = []
    for number, line in enumerate(whole.splitlines()):
        try:
            row = json.loads(line)
            same = row["number"] == number and row["prompt"]["user"] == prompts[number].user
            if not same or not isinstance(row["answer"], str):
                raise ValueError("another prompt")
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise UserError(
                f"{file}: line {number + 1}: no answer to its prompt ({error}): name another folder"
            ) from error
        found.append(row["answer"])
    return found


def _write_lines(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    _replace(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _replace(file: Path, text: str) -> None:
    """Writes a file whole; half a character of an answer as the escape that JSON has for it."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(temporary, file)
