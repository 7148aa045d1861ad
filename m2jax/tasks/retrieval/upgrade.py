# SPDX-License-Identifier: Apache-2.0
"""Whether an upgrade of an embedding model is safe: measured on labelled queries and galleries.

Four galleries are searched with the new model's queries or the old one's: old by old (what users
have), new by new (what they get in the end), old by new (what they get at once) and a half filled
one by new (what they get meanwhile). A folder per data set holds ``old_queries.npz``,
``old_gallery.npz``, ``new_queries.npz``, ``new_gallery.npz`` with ``features`` and ``ids``, the
same two of ``alone`` (a new model trained without regard to the old one) where there is one, and
``truth.json``: {"right": {query: [items]}} or {"easy": ..., "hard": ..., "junk": ...}.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool

from m2jax.config import UserError
from m2jax.tasks import ranking
from m2jax.tasks.ranking import FeatureScores
from m2jax.tasks.retrieval import metrics
from m2jax.tasks.retrieval.backfill import Features, read_features
from m2jax.tasks.retrieval.compatibility import Measured, Scores, compatibility
from m2jax.tasks.vectors import unit

KINDS = ("right", "easy", "hard", "junk")


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
    """A data set, its features in one order of ids."""

    features: dict[str, tuple[np.ndarray, np.ndarray]]  # model -> queries, gallery
    ids: list[str]  # of the gallery
    measure: Callable[[np.ndarray, np.ndarray], float]
    metric: str


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
    old = data.measure(old_queries, old_gallery)
    new = data.measure(new_queries, new_gallery)
    cross = data.measure(new_queries, old_gallery)
    half = _half(data.ids)[:, None]
    mixed = data.measure(new_queries, np.where(half, new_gallery, old_gallery))
    alone = data.measure(*data.features["alone"]) if "alone" in data.features else None
    against = []
    if not cross > old + margin:
        against.append(f"cross-test {cross:.4f} is not above the old self-test {old:.4f}")
    if new < old:
        against.append(f"self-test {new:.4f} is below the old one {old:.4f}")
    if mixed < old:
        against.append(f"a half filled gallery gives {mixed:.4f}, below the old {old:.4f}")
    return Verdict(name, data.metric, old, new, cross, mixed, alone, against)


def _half(ids: Sequence[str]) -> Bool[np.ndarray, " items"]:
    """A fixed half of the items."""
    return np.array([hashlib.blake2b(name.encode()).digest()[0] % 2 == 0 for name in ids])


def _read(folder: Path, k: int) -> _Set:
    features, query_ids, gallery_ids = {}, [], []
    for model in ("old", "new", "alone"):
        files = [folder / f"{model}_{side}.npz" for side in ("queries", "gallery")]
        if model == "alone" and not any(file.exists() for file in files):
            continue
        queries, gallery = (read_features([file]) for file in files)
        if not features:
            query_ids, gallery_ids = queries.ids, gallery.ids
        features[model] = (
            _in_order(queries, query_ids, files[0]),
            _in_order(gallery, gallery_ids, files[1]),
        )
        if features[model][0].shape[1] != features[model][1].shape[1]:
            raise UserError(f"{files[0]}: of another dimension than {files[1].name}: embed anew")
    if features["old"][1].shape[1] != features["new"][1].shape[1]:
        raise UserError(
            f"{folder}: the old model's vectors have {features['old'][1].shape[1]} numbers, the "
            f"new one's {features['new'][1].shape[1]}: they cannot be compared"
        )
    truth = _truth(folder / "truth.json", query_ids, gallery_ids)
    return _Set(features, gallery_ids, *_measure(truth, k))


def _in_order(features: Features, ids: Sequence[str], file: Path) -> np.ndarray:
    place = {name: row for row, name in enumerate(features.ids)}
    if set(place) != set(ids):
        raise UserError(f"{file}: other ids than the old model's: embed the same items")
    return unit(features.vectors[[place[name] for name in ids]])


def _truth(
    file: Path, queries: Sequence[str], gallery: Sequence[str]
) -> dict[str, list[np.ndarray]]:
    """Rows of the gallery per query and kind."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: unreadable ({error}): write the truth there") from error
    kinds: list[str] = sorted(found) if isinstance(found, dict) else []
    if kinds not in (["right"], ["easy", "hard", "junk"]):
        raise UserError(f'{file}: needs "right", or "easy", "hard" and "junk", and nothing else')
    place = {name: row for row, name in enumerate(gallery)}
    return {kind: _lists(found[kind], kind, queries, place, file) for kind in kinds}


def _lists(
    named: Any, kind: str, queries: Sequence[str], place: Mapping[str, int], file: Path
) -> list[np.ndarray]:
    if not isinstance(named, dict) or not set(named) <= set(queries):
        raise UserError(f'{file}: "{kind}" must map ids of queries to lists of items')
    rows = []
    for query in queries:
        items = named.get(query, [])
        if not isinstance(items, list) or not all(
            isinstance(item, str) and item in place for item in items
        ):
            raise UserError(f'{file}: "{kind}" of {query[:40]!r} names what the gallery lacks')
        rows.append(np.array([place[item] for item in items], np.int64))
    return rows


def _measure(
    truth: Mapping[str, list[np.ndarray]], k: int
) -> tuple[Callable[[np.ndarray, np.ndarray], float], str]:
    """The metric of a truth, from queries and gallery to a number, and its name."""

    def rank(queries: np.ndarray, gallery: np.ndarray, right: Any, ignored: Any) -> ranking.Hits:
        return ranking.hits(FeatureScores(queries, gallery), right, ignored)

    if "right" in truth:
        right = truth["right"]
        if not any(len(each) for each in right):
            raise UserError("truth.json: no query has a right item: nothing can be measured")

        def at_k(queries: np.ndarray, gallery: np.ndarray) -> float:
            return metrics.mean_ap_at(rank(queries, gallery, right, None), k).mean_ap

        return at_k, f"mAP@{k}"
    parts = metrics.protocol(metrics.Truth(*(truth[kind] for kind in KINDS[1:])), "medium")
    if not any(len(each) for each in parts[0]):
        raise UserError("truth.json: no query has a right item: nothing can be measured")

    def medium(queries: np.ndarray, gallery: np.ndarray) -> float:
        truths = metrics.Truth(*(truth[kind] for kind in KINDS[1:]))
        found = metrics.revisited(truths, lambda *two: rank(queries, gallery, *two))
        return found["medium"].mean_ap

    return medium, "medium mAP"
