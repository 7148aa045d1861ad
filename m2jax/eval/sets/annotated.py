# SPDX-License-Identifier: Apache-2.0
"""Questions made from annotations of COCO and Visual Genome: objects, counting, position, acting.

M2-Encoder reports probes of these kinds (COCO-MCC, COCO-COUNT, VG-POS, HOI-POS) and released
neither their questions nor how they were made. These are ours: the same abilities, other questions,
so their figures stand beside each other for our own runs and not beside the paper's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from m2jax.config import UserError
from m2jax.eval import prompts
from m2jax.eval.sets import coco_names, records
from m2jax.eval.sets.records import Asked, Files, Labelled, Place, Question

FILE_BYTES = 2**31
COUNTS = 5  # one to five of a kind are told apart
NUMBERS = {"en": ("one", "two", "three", "four", "five"), "zh": ("一", "两", "三", "四", "五")}
SEED = 7
OTHERS = 3  # wrong answers beside the true one

# What each side is called, and the predicates of Visual Genome that say it.
SIDES = {
    "left": ("to the left of", "在{b}的左边", {"to the left of", "left of", "on the left of"}),
    "right": ("to the right of", "在{b}的右边", {"to the right of", "right of", "on the right of"}),
    "above": ("above", "在{b}的上方", {"above"}),
    "below": ("below", "在{b}的下方", {"below", "under", "beneath", "underneath"}),
}
PEOPLE = {"man", "woman", "person", "boy", "girl", "child", "player", "guy", "lady", "kid"}
ACTS = {
    **{"riding": "骑", "holding": "拿着", "wearing": "穿着", "carrying": "背着", "eating": "吃"},
    **{"throwing": "扔", "catching": "接住", "hitting": "击打", "kicking": "踢", "pulling": "拉"},
    **{"pushing": "推", "feeding": "喂", "petting": "抚摸", "flying": "放飞", "cutting": "切"},
    **{"reading": "看着", "drinking": "喝", "climbing": "爬", "washing": "洗", "driving": "驾驶"},
}


def coco_objects(place: Place) -> Labelled:
    """Which objects COCO annotates in an image, as a multi-label set.

    Raises:
        UserError: annotations are missing or damaged.
    """
    coco = _Coco(place)
    order = sorted(coco.names)
    number = {category: i for i, category in enumerate(order)}
    shown: dict[int, set[int]] = {image: set() for image in coco.files}
    for row in coco.rows:
        shown[row["image_id"]].add(number[row["category_id"]])
    classes = {
        language: [(coco_names.name(coco.names[c], language),) for c in order]
        for language in ("en", "zh")
    }
    labels = [frozenset(shown[image]) for image in coco.files]
    return Labelled(Files(list(coco.files.values())), labels, classes, prompts.TEMPLATES, True)


def coco_count(place: Place) -> Asked:
    """How many of a kind are there, one to five? Only kinds without a crowd in the image.

    Raises:
        UserError: annotations are missing or damaged.
    """
    coco = _Coco(place)
    counts: dict[tuple[int, int], int] = {}
    crowded = set()
    for row in coco.rows:
        key = row["image_id"], row["category_id"]
        counts[key] = counts.get(key, 0) + 1
        if row.get("iscrowd"):
            crowded.add(key)
    place_of = {image: i for i, image in enumerate(coco.files)}
    found: dict[str, list[Question]] = {"en": [], "zh": []}
    for key, count in sorted(counts.items()):
        if key in crowded or count > COUNTS:
            continue
        credit = [float(n == count) for n in range(1, COUNTS + 1)]
        for language, questions in found.items():
            texts = [
                coco_names.counted(coco.names[key[1]], number, n + 1, language)
                for n, number in enumerate(NUMBERS[language])
            ]
            questions.append(Question(place_of[key[0]], texts, credit))
    return _asked(place, list(coco.files.values()), found)


def vg_position(place: Place) -> Asked:
    """On which side of one thing is another? Both named once in the image, and so placed.

    Raises:
        UserError: annotations are missing or damaged.
    """
    said = {word: side for side, (_, _, words) in SIDES.items() for word in words}
    return _related(place, lambda row: said.get(_predicate(row)), _sides, agrees=True)


def vg_interaction(place: Place) -> Asked:
    """What does a person do with a thing, among acts that people do?

    Raises:
        UserError: annotations are missing or damaged.
    """

    def act(row: Mapping[str, Any]) -> str | None:
        who, what = _name(row["subject"]), _predicate(row)
        return what if who in PEOPLE and what in ACTS else None

    return _related(place, act, _acts, agrees=False)


class _Coco:
    """An ``instances`` file of COCO."""

    def __init__(self, place: Place) -> None:
        split = "val2017" if place.split == "test" else place.split
        file = place.path / "annotations" / f"instances_{split}.json"
        content = load_json(file)
        try:
            self.names = {int(row["id"]): str(row["name"]) for row in content["categories"]}
            self.files = {
                int(row["id"]): records.inside(
                    place.images or place.path / split, row["file_name"], str(file)
                )
                for row in content["images"]
            }
            self.rows: Sequence[Mapping[str, Any]] = content["annotations"]
            known = all(
                row["image_id"] in self.files and row["category_id"] in self.names
                for row in self.rows
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{file}: no instances file ({error!r}): copy it again") from error
        if not known:
            raise UserError(f"{file}: an annotation of no image or category: copy it again")


def load_json(file: Path) -> Any:
    """A JSON file of a release.

    Raises:
        UserError: it is missing, damaged, or far too large.
    """
    try:
        if file.stat().st_size > FILE_BYTES:
            raise UserError(f"{file}: over {FILE_BYTES:,} bytes: name the right file")
        return json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}: name the folder of the release") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: damaged JSON ({error}): copy it again") from error


def _related(place: Place, answer: Any, ask: Any, *, agrees: bool) -> Asked:
    """Questions of ``relationships.json``: one per pair of things, in each language that can."""
    file = place.path / "relationships.json"
    chinese = (place.names or {}).get("zh")
    found = {"en": list[Question](), "zh": list[Question]()}
    files: dict[int, int] = {}  # of each image its place among those asked about
    try:
        for image in load_json(file):
            pairs = list(_pairs(image["relationships"], answer, agrees=agrees))
            for order, (first, second, true) in enumerate(pairs):
                number = files.setdefault(int(image["image_id"]), len(files))
                seed = SEED, int(image["image_id"]), order
                rng = np.random.default_rng(seed)
                found["en"].append(ask(number, true, (first, second), "en", rng))
                if isinstance(chinese, Mapping) and first in chinese and second in chinese:
                    names = chinese[first][0], chinese[second][0]
                    rng = np.random.default_rng(seed)
                    found["zh"].append(ask(number, true, names, "zh", rng))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(f"{file}: no relationships file ({error!r}): copy it again") from error
    paths = [_vg_file(place, image) for image in files]
    return _asked(place, paths, {lang: rows for lang, rows in found.items() if rows})


def _pairs(rows: Any, answer: Any, *, agrees: bool) -> Iterator[tuple[str, str, str]]:
    """Pairs of names with the one answer that holds for them.

    A name that several boxes bear says of none which is meant: "the cup" of two.
    """
    boxes: dict[str, set[tuple[float, ...]]] = {}
    for row in rows:
        for thing in (row["subject"], row["object"]):
            corner = tuple(float(thing[key]) for key in ("x", "y", "w", "h"))
            boxes.setdefault(_name(thing), set()).add(corner)
    answers: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        true = answer(row)
        pair = _name(row["subject"]), _name(row["object"])
        if true and all(pair) and pair[0] != pair[1] and all(len(boxes[x]) == 1 for x in pair):
            placed = not agrees or _side(row["subject"], row["object"]) == true
            answers.setdefault(pair, set()).add(true if placed else "")
    for (first, second), given in sorted(answers.items()):
        if len(given) == 1 and "" not in given:
            yield first, second, next(iter(given))


def _sides(number: int, true: str, names: tuple[str, str], language: str, rng: Any) -> Question:
    first, second = names
    texts = [
        f"the {first} is {english} the {second}."
        if language == "en"
        else f"{first}{chinese.format(b=second)}。"
        for english, chinese, _ in SIDES.values()
    ]
    return Question(number, texts, [float(side == true) for side in SIDES])


def _acts(number: int, true: str, names: tuple[str, str], language: str, rng: Any) -> Question:
    others = [act for act in sorted(ACTS) if act != true]
    acts = [true, *(others[i] for i in rng.choice(len(others), OTHERS, replace=False))]
    first, second = names
    texts = [
        f"a {first} {act} a {second}." if language == "en" else f"{first}{ACTS[act]}{second}。"
        for act in acts
    ]
    return Question(number, texts, [1.0] + [0.0] * OTHERS)


def _side(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """Where the middle of one box lies of the other's, by the larger distance."""
    across, down = (
        (first[at] + first[size] / 2) - (second[at] + second[size] / 2)
        for at, size in (("x", "w"), ("y", "h"))
    )
    if abs(across) > abs(down):
        return "left" if across < 0 else "right"
    return "above" if down < 0 else "below"


def _name(thing: Mapping[str, Any]) -> str:
    names = thing.get("names") or [thing.get("name", "")]
    return str(names[0]).strip().lower()


def _predicate(row: Mapping[str, Any]) -> str:
    return str(row["predicate"]).strip().lower()


def _vg_file(place: Place, image: int) -> Path:
    """Visual Genome's images lie in two folders."""
    root = place.images or place.path
    first, second = (root / part / f"{image}.jpg" for part in ("VG_100K", "VG_100K_2"))
    return second if second.is_file() else first


def _asked(place: Place, files: list[Path], found: dict[str, list[Question]]) -> Asked:
    if not any(found.values()):
        raise UserError(f"{place.path}: no question can be made of its annotations: check the file")
    return Asked(Files(files), found)
