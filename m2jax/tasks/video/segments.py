# SPDX-License-Identifier: Apache-2.0
"""VCSL's files: copied segments of pairs of videos, pairs of a split, query sets.

A segment is ``[query start, reference start, query end, reference end]``: seconds, or frames at one
per second. Segments of a pair lie under the key ``QUERY-REFERENCE``. He et al., CVPR 2022 (VCSL).
"""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from m2jax.config import UserError

FILE_LIMIT = 2**30  # bytes of a file of labels, pairs or predictions
SIDES = ("query start", "reference start", "query end", "reference end")

Boxes = Sequence[Sequence[float]]


class Segments(NamedTuple):
    """Segments of several pairs of videos, one after the other."""

    boxes: Float64[np.ndarray, "segments 4"]
    counts: Int64[np.ndarray, " pairs"]  # segments of each pair

    @property
    def owners(self) -> Int64[np.ndarray, " segments"]:
        """The pair of each segment."""
        return np.repeat(np.arange(len(self.counts)), self.counts)


def gather(pairs: Sequence[Boxes], what: str = "segments") -> Segments:
    """Lists of segments, one list per pair, as arrays.

    Args:
        pairs: of each pair its segments, or none.
        what: names the lists in errors.

    Raises:
        UserError: a segment that is not four finite numbers; ``[[]]`` is one of no numbers.
    """
    counts = np.fromiter((len(boxes) for boxes in pairs), np.int64, len(pairs))
    flat = list(itertools.chain.from_iterable(pairs))
    if not flat:
        return Segments(np.zeros((0, 4)), counts)
    try:
        values: np.ndarray = np.array(flat)
    except ValueError:  # of several lengths
        raise _wrong(pairs, what) from None
    if values.ndim != 2 or values.shape[1] != 4 or values.dtype.kind not in "iuf":
        raise _wrong(pairs, what)
    if not np.isfinite(values).all():
        raise _wrong(pairs, what)
    return Segments(values.astype(np.float64), counts)


def _wrong(pairs: Sequence[Boxes], what: str) -> UserError:
    """The error that names the first segment which is none."""
    for number, boxes in enumerate(pairs):
        for box in boxes:
            found = np.array(box, dtype=object).reshape(-1) if _is_list(box) else []
            if len(found) == 4 and all(_is_number(value) for value in found):
                continue
            shown = repr(box)[:80]
            return UserError(
                f"{what}: pair {number}: {shown} is no segment: write [{', '.join(SIDES)}]"
            )
    return UserError(f"{what}: not lists of segments: write [[{', '.join(SIDES)}], ...]")


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple, np.ndarray))


def _is_number(value: Any) -> bool:
    number = isinstance(value, (int, float, np.integer, np.floating))
    return number and not isinstance(value, bool) and bool(abs(value) < 1e300)


def read_segments(path: Path, *, forward: bool) -> dict[str, Boxes]:
    """A file of labels or predictions.

    Args:
        path: JSON, ``{"QUERY-REFERENCE": [segment, ...]}``.
        forward: refuse segments that end before they start. The official labels have one such, and
            it is scored as the published code scores it; in predictions it would score nonsense
            (a precision of 1e14), so there it is a mistake.

    Raises:
        UserError: unreadable, or something in it is no segment; named by its pair.
    """
    document = _read_json(path)
    if not isinstance(document, dict):
        raise UserError(f"{path}: no object of pairs: write {{'QUERY-REFERENCE': [segment, ...]}}")
    for key, boxes in document.items():
        if not isinstance(boxes, list) or not all(isinstance(box, list) for box in boxes):
            raise UserError(f"{path}: pair {key:.80}: no list of segments: write [] for none")
    keys = list(document)
    try:
        found = gather([document[key] for key in keys], str(path))
    except UserError:  # once more, one by one, to name the pair
        for key in keys:
            gather([document[key]], f"{path}: {key:.80}")
        raise
    backward = (found.boxes[:, 2:] < found.boxes[:, :2]).any(axis=1)
    if forward and backward.any():
        row = int(np.flatnonzero(backward)[0])
        raise UserError(
            f"{path}: pair {keys[found.owners[row]]:.80}: segment {found.boxes[row].tolist()} ends "
            "before it starts: mend what wrote it"
        )
    return document


def write_segments(segments: Mapping[str, Boxes], file: Any) -> None:
    """Writes labels or predictions as VCSL does, into an open binary file."""
    rows = {key: [list(box) for box in boxes] for key, boxes in segments.items()}
    file.write((json.dumps(rows, separators=(", ", ": ")) + "\n").encode())


def read_pairs(path: Path) -> list[str]:
    """Keys of a split's pairs from a table with the columns ``query_id`` and ``reference_id``.

    Raises:
        UserError: unreadable, without these columns, or a pair is there twice.
    """
    lines = _read_text(path).splitlines()
    rows = csv.DictReader(lines)
    if not {"query_id", "reference_id"} <= set(rows.fieldnames or ()):
        raise UserError(f"{path}: has no columns query_id,reference_id: name a file of pairs")
    keys = [f"{row['query_id']}-{row['reference_id']}" for row in rows]
    if len(set(keys)) < len(keys):
        seen: set[str] = set()
        twice = next(key for key in keys if key in seen or seen.add(key))
        raise UserError(f"{path}: pair {twice:.80} is there twice: remove one")
    return keys


def read_query_sets(path: Path, split: str) -> dict[str, list[str]]:
    """Keys of the pairs of each query set of a split (``split_meta_pairs.json``).

    Raises:
        UserError: unreadable, or it has no such split.
    """
    document = _read_json(path)
    sets = document.get(split) if isinstance(document, dict) else None
    if not isinstance(sets, dict) or not sets:
        raise UserError(f"{path}: has no query sets of the split {split}: check --split")
    for name, keys in sets.items():
        if not isinstance(keys, list) or not keys or not all(isinstance(k, str) for k in keys):
            raise UserError(f"{path}: query set {name:.80}: no list of pairs: mend it")
    return sets


def write_pairs(keys: Iterable[tuple[str, str]], file: Any) -> None:
    """Writes pairs (query, reference) as VCSL's tables do, into an open binary file."""
    file.write("".join(["query_id,reference_id\n", *(f"{q},{r}\n" for q, r in keys)]).encode())


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > FILE_LIMIT:
            raise UserError(f"{path}: over {FILE_LIMIT:,} bytes: split it")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: check the path") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8: save it in that encoding") from None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: no JSON ({error}): write it anew") from None
