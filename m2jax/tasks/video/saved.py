# SPDX-License-Identifier: Apache-2.0
"""A trained detector or keyframe extractor as a folder: ``video.json``, ``video.safetensors``."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from m2jax.config import UserError
from m2jax.tasks import part_folder
from m2jax.tasks.part_folder import Layout
from m2jax.tasks.video.ssan import Part, Settings, new_detector, new_scorer

LAYOUT = Layout("video", "m2jax video train")
WIDEST = 2**16  # numbers of a feature
KNOWN = {each.name for each in fields(Settings)}


def write(directory: Path, part: Part) -> None:
    """Makes the folder, whole or not at all.

    Raises:
        UserError: it exists or cannot be made.
    """
    tensors = {}
    for name in ("detector", "scorer"):
        for key, value in _flat(name, getattr(part, name)).items():
            tensors[key] = np.ascontiguousarray(value, np.float32)
    card = {
        "settings": asdict(part.settings),
        "dim": part.dim,
        "parts": [name for name in ("detector", "scorer") if getattr(part, name) is not None],
        "model": part.model,
        "report": part.report,
    }
    part_folder.write(directory, LAYOUT, card, tensors)


def read(directory: Path) -> Part:
    """The folder of ``write``; checked, as it may come from anywhere.

    Raises:
        UserError: no such folder, one of another version, or numbers that do not fit together.
    """
    card, tensors = part_folder.read(directory, LAYOUT)
    given = card.get("settings")
    others = set(given) - KNOWN if isinstance(given, dict) else set()
    if others:
        raise _of_another_version(directory, f"has the setting {min(others):.80}")
    try:
        settings, dim, parts = Settings(**card["settings"]), card["dim"], card["parts"]
        if not isinstance(dim, int) or not 0 < dim <= WIDEST:
            raise ValueError(f"dim {dim!r:.40}")
        if not parts or not set(parts) <= {"detector", "scorer"}:
            raise ValueError(f"parts {parts!r:.80}")
        model, report = str(card["model"]), dict(card["report"])
    except (KeyError, TypeError, ValueError, UserError) as error:
        raise UserError(f"{directory}: damaged ({error}): copy it again") from error
    makers = {
        "detector": lambda: new_detector(settings),
        "scorer": lambda: new_scorer(settings, dim),
    }
    empty = {name: nnx.split(nnx.eval_shape(makers[name]))[1] for name in parts}
    # A file of tensors that is cut is not read at all: other names are no damage.
    wanted = {_key(name, path) for name in parts for path, _ in nnx.to_flat_state(empty[name])}
    if wanted != set(tensors):
        key = min(wanted ^ set(tensors))
        raise _of_another_version(directory, f"{'lacks' if key in wanted else 'has'} {key:.80}")
    found = {name: _filled(directory, name, empty[name], tensors) for name in parts}
    return Part(settings, dim, found.get("detector"), found.get("scorer"), model, report)


def fingerprint(part: Part, most: float) -> str:
    """Tells choices of keyframes apart: settings and values, and which like ones are dropped."""
    digest = hashlib.sha256(repr((part.settings.window, part.dim)).encode())
    for key, value in _flat("scorer", part.scorer).items():
        digest.update(key.encode() + np.ascontiguousarray(value, np.float32).tobytes())
    return f"{digest.hexdigest()[:16]}/{most!r}"


def _flat(name: str, state: Any) -> dict[str, Any]:
    """Arrays of a state by their path, with the part's name in front."""
    if state is None:
        return {}
    return {_key(name, path): value[...] for path, value in nnx.to_flat_state(state)}


def _key(name: str, path: Sequence[Any]) -> str:
    return f"{name}.{'.'.join(map(str, path))}"


def _of_another_version(directory: Path, what: str) -> UserError:
    return UserError(
        f"{directory}: made by another version of m2jax ({what}): train it anew with "
        f"{LAYOUT.maker}, and index anew what it chose"
    )


def _filled(directory: Path, name: str, state: Any, tensors: Mapping[str, np.ndarray]) -> Any:
    """The state of a module, its shapes those that its settings give."""
    values = []
    for path, wanted in nnx.to_flat_state(state):
        key = _key(name, path)
        value = tensors[key]
        if value.shape != wanted.shape or value.dtype != np.float32:
            raise UserError(
                f"{directory}: damaged ({key} does not fit its settings): copy it again"
            )
        if not np.isfinite(value).all():
            raise UserError(f"{directory}: damaged ({key} is not finite): copy it again")
        values.append((path, wanted.replace(jax.numpy.asarray(value))))
    return nnx.from_flat_state(values)
