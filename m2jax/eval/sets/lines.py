# SPDX-License-Identifier: Apache-2.0
"""JSON lines: the layout of the M2 release's retrieval files, and its like for the other suites.

One object per line with ``image``, a path relative to the file's folder (or to ``--images``), and

- ``caption``: a text or a list of texts, as the release has it; or an object of such lists by
  language; lines of one image are taken together;
- or ``label``: a class name, its number, or a list of either (then the set is multi-label);
- or ``texts`` and ``right``: candidate answers, and the index of the true one; with ``question``
  the answers are asked about it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from m2jax.config import UserError
from m2jax.eval.sets import records
from m2jax.eval.sets.records import Asked, Captioned, DataSet, Files, Labelled, Place, Question

LINE_BYTES = 2**20


def read(place: Place) -> DataSet:
    """A file of JSON lines.

    Raises:
        UserError: it cannot be read, or a line is not as described; the message names the line.
    """
    rows = list(_rows(place.path))
    if not rows:
        raise UserError(f"{place.path}: has no lines: name another file")
    root = place.images or place.path.parent
    first = rows[0][1]
    for key, make in _KINDS.items():
        if key in first:
            files = [records.inside(root, row.get("image"), where) for where, row in rows]
            return make(place, rows, files)
    raise UserError(
        f"{rows[0][0]}: has none of {', '.join(_KINDS)}: see `m2jax eval --help` for the layouts"
    )


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The objects of a file and where they stand."""
    number = 0
    try:
        with path.open("rb") as file:
            while line := file.readline(LINE_BYTES):
                number += 1
                where = f"{path}:{number}"
                if len(line) == LINE_BYTES:
                    raise UserError(f"{where}: longer than {LINE_BYTES:,} bytes: mend the file")
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError("no object")
                    yield where, row
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: check the path") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}:{number}: damaged JSON ({error}): mend the line") from error


def texts_of(value: Any, where: str, key: str) -> list[str]:
    """A list of texts, not empty.

    Raises:
        UserError: it is none.
    """
    found = [value] if isinstance(value, str) else value
    good = isinstance(found, list) and found and all(isinstance(t, str) and t for t in found)
    if not good:
        raise UserError(f"{where}: {key} {value!r:.60} is no list of texts: mend the line")
    return found


Rows = Sequence[tuple[str, Mapping[str, Any]]]


def _captioned(place: Place, rows: Rows, files: list[Path]) -> Captioned:
    by_language: dict[str, list[list[str]]] = {}
    if isinstance(rows[0][1]["caption"], dict):
        for language in rows[0][1]["caption"]:
            by_language[language] = [
                texts_of(_entry(row.get("caption"), language), where, f"caption.{language}")
                for where, row in rows
            ]
    else:
        lists = [texts_of(row.get("caption"), where, "caption") for where, row in rows]
        language = place.language or records.language_of([text for each in lists for text in each])
        by_language[language] = lists
    # One picture on several lines is one picture: each of its captions is right for it.
    place_of: dict[Path, int] = {}
    numbers = [place_of.setdefault(file, len(place_of)) for file in files]
    merged = {language: [list[str]() for _ in place_of] for language in by_language}
    for language, lists in by_language.items():
        for number, texts in zip(numbers, lists, strict=True):
            merged[language][number] += texts
    return Captioned(Files(list(place_of)), merged)


def _labelled(place: Place, rows: Rows, files: list[Path]) -> Labelled:
    multi = any(isinstance(row.get("label"), list) for _, row in rows)
    used = {x for _, row in rows for x in _listed(row.get("label")) if isinstance(x, str)}
    keys = sorted(used) or _numbers(place)
    classes = records.named(place, keys)
    numbers = {key: number for number, key in enumerate(keys)}
    labels = []
    for where, row in rows:
        found = _listed(row.get("label"))
        known = [numbers.get(str(x)) if type(x) in (int, str) else None for x in found]
        shown = frozenset(x for x in known if x is not None)
        if None in known or not (shown or multi):
            raise UserError(f"{where}: label {row.get('label')!r:.60} is no class: mend the line")
        labels.append(shown)
    return Labelled(Files(files), labels, classes, {}, multi)


def _numbers(place: Place) -> list[str]:
    """What numbered labels are called."""
    if place.names is None:
        raise UserError(f"{place.path}: labels are numbers: give their names with --classes FILE")
    return [str(number) for number in range(len(next(iter(place.names.values()))))]


def _asked(place: Place, rows: Rows, files: list[Path]) -> Asked:
    questions, asked = [], []
    for number, (where, row) in enumerate(rows):
        texts, right = texts_of(row.get("texts"), where, "texts"), row.get("right")
        if type(right) is not int or not 0 <= right < len(texts) or len(texts) < 2:
            raise UserError(f"{where}: right={right!r:.20} points at none of the texts: mend it")
        if "question" in row:
            [question] = texts_of(row["question"], where, "question")
            texts = [f"{question} {text}" for text in texts]
        questions.append(Question(number, texts, [float(i == right) for i in range(len(texts))]))
        asked.append(texts[right])
    language = place.language or records.language_of(asked)
    return Asked(Files(files), {language: questions})


_KINDS: dict[str, Callable[[Place, Rows, list[Path]], DataSet]] = {
    "caption": _captioned,
    "label": _labelled,
    "texts": _asked,
}


def _entry(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, dict) else None


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
