# SPDX-License-Identifier: Apache-2.0
"""A trained adapter as a folder: ``adapter.json``, ``adapter.safetensors``; no code in either."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from m2jax.config import UserError
from m2jax.tasks import part_folder
from m2jax.tasks.labels import vocabulary as vocabulary_lib
from m2jax.tasks.labels.adapter import Settings
from m2jax.tasks.labels.vocabulary import Vocabulary
from m2jax.tasks.part_folder import Layout

LAYOUT = Layout("adapter", "labels train")
NAMES = {"w1": 2, "b1": 1, "w2": 2, "b2": 1}  # and their number of axes


@dataclass(frozen=True)
class Saved:
    """All that prediction needs beside the model."""

    vocabulary: Vocabulary
    languages: tuple[str, ...]
    settings: Settings
    params: Mapping[str, np.ndarray]
    prompts: np.ndarray  # [classes, dim]
    thresholds: np.ndarray  # [classes]
    model: str  # its fingerprint
    report: Mapping[str, Any] = field(default_factory=dict)


def write(directory: Path, saved: Saved) -> None:
    """Makes the folder, whole or not at all.

    Raises:
        UserError: it exists or cannot be made.
    """
    card = {
        "labels": saved.vocabulary.to_list(),
        "languages": list(saved.languages),
        "settings": asdict(saved.settings),
        "model": saved.model,
        "report": dict(saved.report),
    }
    tensors = {name: np.ascontiguousarray(saved.params[name], np.float32) for name in NAMES}
    tensors["prompts"] = np.ascontiguousarray(saved.prompts, np.float32)
    tensors["thresholds"] = np.ascontiguousarray(saved.thresholds, np.float32)
    part_folder.write(directory, LAYOUT, card, tensors)


def read(directory: Path) -> Saved:
    """The folder of ``write``; checked, as it may come from anywhere.

    Raises:
        UserError: no such folder, another format, or numbers that do not fit together.
    """
    card, tensors = part_folder.read(directory, LAYOUT)
    file = directory / LAYOUT.card
    try:
        words = vocabulary_lib.checked(card["labels"], str(file))
        settings = Settings(**card["settings"])
        languages = tuple(map(str, card["languages"]))
        model, report = str(card["model"]), dict(card["report"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file}: damaged ({error!r}): copy it again") from error
    _check_shapes(tensors, settings, len(words), directory)
    params = {name: tensors[name] for name in NAMES}
    found = Saved(
        words, languages, settings, params, tensors["prompts"], tensors["thresholds"], model, report
    )
    return found


def _check_shapes(
    tensors: Mapping[str, np.ndarray], settings: Settings, classes: int, directory: Path
) -> None:
    wanted = {**NAMES, "prompts": 2, "thresholds": 1}
    fits = set(tensors) == set(wanted) and all(
        tensors[name].ndim == axes and tensors[name].dtype == np.float32
        for name, axes in wanted.items()
    )
    if fits:
        (dim, hidden), out = tensors["w1"].shape, tensors["w2"].shape[1]
        fits = (
            tensors["w2"].shape[0] == hidden == len(tensors["b1"])
            and len(tensors["b2"]) == out == (dim if settings.kind == "residual" else classes)
            and tensors["prompts"].shape == (classes, dim)
            and len(tensors["thresholds"]) == classes
            and all(np.isfinite(each).all() for each in tensors.values())
        )
    if not fits:
        raise UserError(
            f"{directory / LAYOUT.weights}: does not fit its {LAYOUT.card}: copy the folder again"
        )
