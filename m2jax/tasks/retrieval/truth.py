# SPDX-License-Identifier: Apache-2.0
"""Which items are right for which query: our own truth.json, or what a data set publishes.

``truth.json`` is {"right": {query: [items]}} or {"easy": ..., "hard": ..., "junk": ...}, by ids.
``gnd_roxford5k.pkl``, ``gnd_rparis6k.pkl`` and Google Landmarks' ``retrieval_solution_v2.1.csv``
name images: ids are then paths of files, and what is neither query nor gallery is passed over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from m2jax.config import UserError
from m2jax.tasks import ranking
from m2jax.tasks.ranking import FeatureScores
from m2jax.tasks.retrieval import landmarks, metrics

OWN = "truth.json"
PUBLISHED = ("gnd_r*.pkl", "retrieval_solution*.csv")
KINDS = ("right", "easy", "hard", "junk")


class Truth(NamedTuple):
    """Ids of the queries and of the gallery, and per kind and query rows of the gallery."""

    queries: list[str]
    gallery: list[str]
    kinds: dict[str, list[np.ndarray]]


def find(folder: Path) -> Path:
    """The one truth of a folder; where there is none, where our own would be.

    Raises:
        UserError: more than one.
    """
    found = [file for name in (OWN, *PUBLISHED) for file in sorted(folder.glob(name))]
    if len(found) > 1:
        raise UserError(f"{folder}: has {found[0].name} and {found[1].name}: leave one truth there")
    return found[0] if found else folder / OWN


def read(file: Path, queries: Sequence[str], gallery: Sequence[str]) -> Truth:
    """A truth about features of these ids.

    Raises:
        UserError: no truth, one of items that have no features, or without a right item.
    """
    readers = {".pkl": _revisited, ".csv": _gldv2}
    found = readers.get(file.suffix, _own)(file, queries, gallery)
    right = found.kinds.get("right") or metrics.protocol(_protocols(found), "medium")[0]
    if not any(len(each) for each in right):
        raise UserError(f"{file}: no query has a right item: nothing can be measured")
    return found


def figures(truth: Truth, queries: np.ndarray, gallery: np.ndarray, *, k: int) -> dict[str, float]:
    """mAP@k where right items alone are named, else the mAP of the three revisited protocols.

    A protocol by which no query has a right item is left out; medium never is.

    Args:
        truth: what is right.
        queries: unit vectors [n, dim] in the truth's order.
        gallery: the same, of its items.
        k: of mAP@k.
    """

    def rank(right: Any, ignored: Any) -> ranking.Hits:
        return ranking.hits(FeatureScores(queries, gallery), right, ignored)

    if "right" in truth.kinds:
        return {f"mAP@{k}": metrics.mean_ap_at(rank(truth.kinds["right"], None), k).mean_ap}
    found = metrics.revisited(_protocols(truth), rank)
    real = {name: each.mean_ap for name, each in found.items() if not np.isnan(each.mean_ap)}
    return {f"{name} mAP": value for name, value in real.items()}


def headline(found: Mapping[str, float]) -> str:
    """Name of the figure that stands for a data set: mAP@k, or that of the medium protocol."""
    return "medium mAP" if "medium mAP" in found else next(iter(found))


def _protocols(truth: Truth) -> metrics.Truth:
    return metrics.Truth(*(truth.kinds[kind] for kind in KINDS[1:]))


def _own(file: Path, queries: Sequence[str], gallery: Sequence[str]) -> Truth:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: unreadable ({error}): write the truth there") from error
    kinds: list[str] = sorted(found) if isinstance(found, dict) else []
    if kinds not in (["right"], ["easy", "hard", "junk"]):
        raise UserError(f'{file}: needs "right", or "easy", "hard" and "junk", and nothing else')
    place = {name: row for row, name in enumerate(gallery)}
    rows = {kind: _lists(found[kind], kind, queries, place, file) for kind in kinds}
    return Truth([*queries], [*gallery], rows)


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


def _revisited(file: Path, queries: Sequence[str], gallery: Sequence[str]) -> Truth:
    """Of revisited Oxford or Paris; its rows are those of its own list of images."""
    found = landmarks.revisited(file)
    asked, items = _by_image(queries, file), _by_image(gallery, file)
    return Truth(
        [_id_of(path.stem, asked, "queries", file) for path in found.queries],
        [_id_of(path.stem, items, "gallery", file) for path in found.gallery],
        found.truth._asdict(),
    )


def _gldv2(file: Path, queries: Sequence[str], gallery: Sequence[str]) -> Truth:
    """Of the private queries of Google Landmarks v2; the gallery is all that is there."""
    found = landmarks.gldv2_solution(file)
    asked, items = _by_image(queries, file), _by_image(gallery, file)
    place = {name: row for row, name in enumerate(gallery)}
    right = [[place[_id_of(image, items, "gallery", file)] for image in row] for row in found.right]
    return Truth(
        [_id_of(image, asked, "queries", file) for image in found.queries],
        [*gallery],
        {"right": [np.array(row, np.int64) for row in right]},
    )


def _by_image(ids: Sequence[str], file: Path) -> dict[str, str]:
    """Ids by the names of their images: paths without folders and endings."""
    found: dict[str, str] = {}
    for name in ids:
        image = Path(name).stem
        if image in found:
            raise UserError(
                f"{file}: {found[image][:60]!r} and {name[:60]!r} are both its {image[:40]!r}: "
                "embed each image once"
            )
        found[image] = name
    return found


def _id_of(image: str, ids: Mapping[str, str], side: str, file: Path) -> str:
    if image not in ids:
        raise UserError(
            f"{file}: names {image}, of which the {side} hold no features: embed all of its images"
        )
    return ids[image]
