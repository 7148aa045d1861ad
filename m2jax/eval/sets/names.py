# SPDX-License-Identifier: Apache-2.0
"""The user's own class names and prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from m2jax.config import UserError
from m2jax.eval.sets import records
from m2jax.eval.sets.records import ClassNames

FILE_BYTES = 2**26


def read_classes(path: Path) -> ClassNames:
    """Names of classes: one per line, or JSON by language.

    The JSON is an object of languages. Each has a list of names in the order of the classes, or an
    object from what the data set calls a class (ImageNet: n01440764) to its names. A name may be a
    list of several that mean the same: their features are averaged.

    Raises:
        UserError: it cannot be read, or is none of these.
    """
    text = _text(path, "--classes")
    if path.suffix != ".json":
        lines = [line.strip() for line in text.splitlines()]
        if not lines or not all(lines):
            raise UserError(f"--classes {path}: has empty lines: write one name per line")
        return {records.language_of(lines): [(line,) for line in lines]}
    found = {}
    for language, names in _by_language(path, text, "--classes").items():
        if isinstance(names, Mapping):
            found[language] = {str(k): _synonyms(path, v) for k, v in names.items()}
        elif isinstance(names, list) and names:
            found[language] = [_synonyms(path, each) for each in names]
        else:
            raise UserError(f"--classes {path}: {language}: neither list nor object: mend it")
    if len({len(names) for names in found.values()}) != 1:
        raise UserError(f"--classes {path}: languages name different numbers of classes: mend it")
    return found


def read_templates(path: Path) -> Mapping[str, Sequence[str]]:
    """Prompts, each with ``{c}`` where the class goes: one per line, or JSON lists by language.

    Raises:
        UserError: it cannot be read, or a prompt has no ``{c}``.
    """
    text = _text(path, "--templates")
    if path.suffix == ".json":
        found = _by_language(path, text, "--templates")
    else:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        found = {records.language_of(lines): lines}
    for language, prompts in found.items():
        check_templates(prompts, f"--templates {path}: {language}")
    return found


def check_templates(prompts: Any, where: str) -> None:
    """Refuses prompts that would be the same for every class.

    Raises:
        UserError: they are no list of texts that each have a place for the name.
    """
    good = isinstance(prompts, list) and prompts
    if not good or not all(isinstance(p, str) and "{c}" in p for p in prompts):
        raise UserError(f"{where}: a prompt lacks {{c}}: mend it")


def _text(path: Path, flag: str) -> str:
    try:
        if path.stat().st_size > FILE_BYTES:
            raise UserError(f"{flag} {path}: over {FILE_BYTES:,} bytes: name the right file")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror}: check the path") from error
    except UnicodeDecodeError:
        raise UserError(f"{flag} {path}: not UTF-8: save it in that encoding") from None


def _by_language(path: Path, text: str, flag: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{flag} {path}: damaged JSON ({error}): mend it") from error
    if not isinstance(found, dict) or not found or not set(found) <= {"en", "zh"}:
        raise UserError(f"{flag} {path}: no object of languages: write {{'en': ..., 'zh': ...}}")
    return found


def _synonyms(path: Path, value: Any) -> tuple[str, ...]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names or not all(isinstance(n, str) and n for n in names):
        raise UserError(f"--classes {path}: {value!r:.60} is no name: write texts")
    return tuple(names)
