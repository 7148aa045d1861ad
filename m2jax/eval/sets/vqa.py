# SPDX-License-Identifier: Apache-2.0
"""VQA by answer ranking: questions, each with candidate answers, in the layout of VQA v1 and v2.

The folder holds ``*questions.json``, ``*annotations.json`` (ten human answers each) and images.
Where a question lists its candidates (VQA v1's MultipleChoice files) those are ranked; else they
are the most frequent answers to its type of question in the training annotations beside it.
Choosing an answer earns what the VQA evaluation gives for it (Antol et al. 2015, equation 1): the
mean over leaving out one person of min(others who said it / 3, 1). Texts are compared in lower case
without full stops and outer spaces; the evaluation's table of contractions is not applied.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from m2jax.config import UserError
from m2jax.eval.sets import records
from m2jax.eval.sets.annotated import load_json
from m2jax.eval.sets.records import Asked, Files, Place, Question

CANDIDATES = 16  # of a type of question, where the data set lists none
MOST = 64  # that a file may list


def read(place: Place) -> Asked:
    """The questions of a split, such as val2014.

    Raises:
        UserError: a file is missing or damaged.
    """
    questions = _one(place, "questions.json")
    annotations = _one(place, "annotations.json")
    asked = load_json(questions)
    try:
        answers = {
            row["question_id"]: ([normal(a["answer"]) for a in row["answers"]], _type(row))
            for row in load_json(annotations)["annotations"]
        }
        listed = "multiple_choices" in asked["questions"][0]
        frequent = {} if listed else _frequent(place)
        files: dict[int, int] = {}
        found = []
        for row in asked["questions"]:
            human, kind = answers[row["question_id"]]
            texts = row["multiple_choices"] if listed else frequent.get(kind, ())
            texts = sorted({normal(text) for text in texts})[:MOST]
            if len(texts) < 2:
                raise UserError(f"{questions}: {kind!r} has no candidates: add training answers")
            number = files.setdefault(int(row["image_id"]), len(files))
            said = [f"{row['question'].strip()} {text}" for text in texts]
            found.append(Question(number, said, [credit(text, human) for text in texts]))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(f"{questions}: not VQA's layout ({error!r}): copy it again") from error
    language = place.language or records.language_of([q.texts[0] for q in found])
    return Asked(Files([_image(place, number) for number in files]), {language: found})


def normal(answer: str) -> str:
    """An answer as it is compared."""
    return " ".join(answer.lower().replace(".", " ").split())


def credit(answer: str, human: Sequence[str]) -> float:
    """What an answer earns beside those of people."""
    same = sum(text == answer for text in human)
    return sum(min((same - (text == answer)) / 3, 1.0) for text in human) / max(len(human), 1)


def _type(row: Mapping[str, Any]) -> str:
    return str(row.get("question_type", row.get("answer_type", "")))


def _frequent(place: Place) -> dict[str, list[str]]:
    """The most frequent training answers to each type of question."""
    found = [p for p in sorted(place.path.glob("*annotations.json")) if "train" in p.name]
    if len(found) != 1:
        raise UserError(
            f"{place.path}: needs one *train*annotations.json for candidates, has {len(found)}"
        )
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for row in load_json(found[0])["annotations"]:
        counts[_type(row)].update(normal(a["answer"]) for a in row["answers"])
    return {kind: [text for text, _ in c.most_common(CANDIDATES)] for kind, c in counts.items()}


def _one(place: Place, ending: str) -> Path:
    """The one file of a split with this ending."""
    found = [p for p in sorted(place.path.glob(f"*{ending}")) if place.split in p.name]
    if len(found) != 1:
        raise UserError(
            f"{place.path}: {len(found)} files *{place.split}*{ending} where one is needed: "
            "name the split with --split, such as val2014"
        )
    return found[0]


def _image(place: Place, number: int) -> Path:
    """COCO's name of an image of this split."""
    root = place.images or place.path / place.split
    return root / f"COCO_{place.split}_{number:012d}.jpg"
