# SPDX-License-Identifier: Apache-2.0
"""Whether an upgrade of an embedding model is safe: measured on labelled queries and galleries.

Four galleries are searched with the new model's queries or the old one's: old by old (what users
have), new by new (what they get in the end), old by new (what they get at once) and a half filled
one by new (what they get meanwhile). A folder per data set holds ``old_queries.npz``,
``old_gallery.npz``, ``new_queries.npz``, ``new_gallery.npz`` with ``features`` and ``ids``, the
same two of ``alone`` (a new model trained without regard to the old one) where there is one, and
one truth: see there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from m2jax.config import UserError
from m2jax.tasks.retrieval import truth as truth_lib
from m2jax.tasks.retrieval.backfill import Features, in_order, read_features
from m2jax.tasks.retrieval.compatibility import Measured, Scores, compatibility
from m2jax.tasks.retrieval.truth import Truth


class Verdict(NamedTuple):
    """One data set's figures and what speaks against the upgrade."""

    name: str
    metric: str
    old: float  # queries and gallery of the old model
    new: float  # both of the new one: the self-test
    cross: float  # new queries, old gallery: the cross-test
    mixed: float  # new queries, half of the gallery new
    alone: float | None  # both of a new model trained alone
    against: list[str]


class Report(NamedTuple):
    """All data sets, and the scores where every one has a model trained alone."""

    sets: list[Verdict]
    scores: Scores | None

    @property
    def safe(self) -> bool:
        """Nothing speaks against the upgrade."""
        return not any(each.against for each in self.sets)


class _Set(NamedTuple):
    """A data set, its features in the truth's order."""

    features: dict[str, tuple[np.ndarray, np.ndarray]]  # model -> queries, gallery
    truth: Truth
    k: int

    def measure(self, queries: np.ndarray, gallery: np.ndarray) -> tuple[str, float]:
        """Name and value of the figure that stands for it."""
        found = truth_lib.figures(self.truth, queries, gallery, k=self.k)
        name = truth_lib.headline(found)
        return name, found[name]


def judge(folders: Sequence[Path], *, k: int = 100, margin: float = 0.0) -> Report:
    """Measures every data set.

    Args:
        folders: one per data set.
        k: of mAP@k, for truths that name right items alone; others are scored by the medium
            protocol of revisited Oxford and Paris.
        margin: by how much the cross-test must be above the old model's self-test.

    Raises:
        UserError: a folder that lacks something or whose parts do not fit.
    """
    if k < 1 or not 0 <= margin < 1:
        raise UserError(f"--k {k} --margin {margin}: k must be at least 1, the margin in [0, 1)")
    names = [folder.absolute().name for folder in folders]
    if not names or len(set(names)) < len(names):
        raise UserError("upgrade-report: give one or more folders of different names")
    verdicts = [
        _judge(name, _read(folder, k), margin) for name, folder in zip(names, folders, strict=True)
    ]
    measured = {
        each.name: Measured(each.old, each.new, each.cross, each.alone)
        for each in verdicts
        if each.alone is not None
    }
    whole = len(measured) == len(verdicts)
    whole = whole and all(each.alone > max(each.old, 0) for each in measured.values())
    return Report(verdicts, compatibility(measured) if whole else None)


def _judge(name: str, data: _Set, margin: float) -> Verdict:
    old_queries, old_gallery = data.features["old"]
    new_queries, new_gallery = data.features["new"]
    metric, old = data.measure(old_queries, old_gallery)
    _, new = data.measure(new_queries, new_gallery)
    _, cross = data.measure(new_queries, old_gallery)
    half = _half(data.truth.gallery)[:, None]
    _, mixed = data.measure(new_queries, np.where(half, new_gallery, old_gallery))
    alone = data.measure(*data.features["alone"])[1] if "alone" in data.features else None
    against = []
    if not cross > old + margin:
        against.append(f"cross-test {cross:.4f} is not above the old self-test {old:.4f}")
    if new < old:
        against.append(f"self-test {new:.4f} is below the old one {old:.4f}")
    if mixed < old:
        against.append(f"a half filled gallery gives {mixed:.4f}, below the old {old:.4f}")
    return Verdict(name, metric, old, new, cross, mixed, alone, against)


def _half(ids: Sequence[str]) -> Bool[np.ndarray, " items"]:
    """A fixed half of the items."""
    return np.array([hashlib.blake2b(name.encode()).digest()[0] % 2 == 0 for name in ids])


def _read(folder: Path, k: int) -> _Set:
    read: dict[str, tuple[Features, Features]] = {}
    for model in ("old", "new", "alone"):
        files = [folder / f"{model}_{side}.npz" for side in ("queries", "gallery")]
        if model == "alone" and not any(file.exists() for file in files):
            continue
        queries, gallery = read[model] = read_features([files[0]]), read_features([files[1]])
        for file, found, first in zip(files, (queries, gallery), read["old"], strict=True):
            if set(found.ids) != set(first.ids):
                raise UserError(f"{file}: other ids than the old model's: embed the same items")
        if queries.vectors.shape[1] != gallery.vectors.shape[1]:
            raise UserError(f"{files[0]}: of another dimension than {files[1].name}: embed anew")
    old, new = (read[model][1].vectors.shape[1] for model in ("old", "new"))
    if old != new:
        raise UserError(
            f"{folder}: the old model's vectors have {old} numbers, the new one's {new}: they "
            "cannot be compared"
        )
    truth = truth_lib.read(truth_lib.find(folder), *(each.ids for each in read["old"]))
    features = {
        model: (in_order(queries, truth.queries), in_order(gallery, truth.gallery))
        for model, (queries, gallery) in read.items()
    }
    return _Set(features, truth, k)
