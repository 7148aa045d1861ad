# SPDX-License-Identifier: Apache-2.0
"""A trained classifier as a folder, ``longtail.json`` and ``longtail.safetensors``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from m2jax.config import UserError
from m2jax.models.params import flatten
from m2jax.tasks import part_folder
from m2jax.tasks.longtail import model as model_lib
from m2jax.tasks.longtail.model import Params, Settings
from m2jax.tasks.longtail.table import FIELDS, Codes
from m2jax.tasks.part_folder import Layout

LAYOUT = Layout("longtail", "longtail train")


@dataclass(frozen=True)
class Saved:
    """All that prediction needs beside the backbone."""

    codes: Codes
    settings: Settings
    params: Params
    counts: np.ndarray  # [classes] images of training
    allowed: np.ndarray  # [places, classes] bool
    model: str  # fingerprint of the backbone
    report: Mapping[str, Any] = field(default_factory=dict)


def write(directory: Path, saved: Saved) -> None:
    """Makes the folder, whole or not at all.

    Raises:
        UserError: it exists or cannot be made.
    """
    card = {
        "classes": list(saved.codes.classes),
        "values": {name: list(values) for name, values in saved.codes.values.items()},
        "settings": asdict(saved.settings),
        "model": saved.model,
        "report": dict(saved.report),
    }
    tensors = {k: np.ascontiguousarray(v, np.float32) for k, v in flatten(saved.params).items()}
    tensors |= {
        "counts": np.asarray(saved.counts, np.int64),
        "allowed": np.asarray(saved.allowed, np.uint8),
    }
    part_folder.write(directory, LAYOUT, card, tensors)


def read(directory: Path) -> Saved:
    """The folder of ``write``; checked, as it may come from anywhere.

    Raises:
        UserError: no such folder, another format, or numbers that do not fit together.
    """
    card, tensors = part_folder.read(directory, LAYOUT)
    try:
        values = {name: tuple(map(str, card["values"][name])) for name in FIELDS}
        codes = Codes(tuple(map(str, card["classes"])), values)
        if any(len(set(each)) < len(each) for each in (codes.classes, *values.values())):
            raise ValueError("a name twice")
        settings = Settings(**card["settings"])
        fingerprint, report = str(card["model"]), dict(card["report"])
        counts, allowed = tensors.pop("counts"), tensors.pop("allowed") != 0
        params = _fitted(tensors, codes, settings)
        fits = counts.shape == (len(codes.classes),)
        if not fits or allowed.shape != (len(values["code"]), len(codes.classes)):
            raise ValueError("shapes")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{directory}: damaged ({error!r:.200}): copy it again") from error
    return Saved(codes, settings, params, counts, allowed, fingerprint, report)


def _fitted(tensors: Mapping[str, np.ndarray], codes: Codes, settings: Settings) -> Params:
    """The tensors as parameters, compared with those the settings ask for."""
    dim = len(tensors["norm.scale"])
    expected = jax.eval_shape(
        lambda: model_lib.initialise(
            jax.random.key(0), dim, codes.width, len(codes.classes), settings
        )
    )
    shapes = {name: leaf.shape for name, leaf in flatten(expected).items()}
    if shapes != {name: each.shape for name, each in tensors.items()}:
        raise ValueError("the tensors are not those of the settings")
    if not all(np.isfinite(each).all() for each in tensors.values()):
        raise ValueError("a number is none")
    leaves = [tensors[name] for name in flatten(expected)]
    return jax.tree.unflatten(jax.tree.structure(expected), leaves)
