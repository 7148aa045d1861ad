# SPDX-License-Identifier: Apache-2.0
"""Filling a collection with a model's vectors while it is searched, and proving what it holds.

The collection itself is the record of progress: of each batch, what has the version already is
passed over. So a run may be stopped or killed anywhere and started again, several may run at once,
and there is no file beside the database that could disagree with it.
"""

from __future__ import annotations

import hashlib
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from m2jax.config import UserError
from m2jax.data import npz
from m2jax.tasks.retrieval.store import ID_BYTES, Store, checked_version
from m2jax.tasks.vectors import TINY, unit

BATCH = 1000  # items of one write
SAME = 1e-5  # numbers of equal vectors may differ by
# In an id: a filter cannot say all of them.
UNSTORABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


class Features(NamedTuple):
    """Vectors by the names of their items."""

    ids: list[str]
    vectors: Float32[np.ndarray, "items dim"]


class Progress(NamedTuple):
    """What a backfill has done so far."""

    seen: int
    added: int  # items that were not there
    replaced: int  # items of another version
    passed: int  # items that had this version already


class Contents(NamedTuple):
    """What a collection holds."""

    items: int
    versions: dict[str, int]
    checksum: str  # of ids, versions and vectors, in any order
    repeated: int  # ids that came more than once: always 0 in a sound collection


def shards(files: Iterable[Path]) -> Iterator[Features]:
    """Features of the .npz files that ``m2jax embed`` writes, one file at a time.

    Raises:
        UserError: a file that cannot be read, features that are no numbers, an id that cannot be
            stored or comes twice, or files that do not fit each other.
    """
    seen: set[str] = set()
    dim = 0
    for file in files:
        vectors, names = _arrays(file)
        if vectors.ndim != 2 or names.shape != vectors.shape[:1] or not vectors.size:
            raise UserError(
                f"{file}: features {vectors.shape} and ids {names.shape} do not fit: give "
                "[n, dim] and [n]"
            )
        if dim and vectors.shape[1] != dim:
            raise UserError(f"{file}: features of another dimension than before it: split them")
        dim = vectors.shape[1]
        if vectors.dtype.kind not in "fiu":
            raise UserError(f"{file}: features are {vectors.dtype}: give floats or whole numbers")
        if not np.isfinite(vectors).all():
            raise UserError(f"{file}: a feature is not a number: embed anew")
        with np.errstate(over="ignore", under="ignore"):
            vectors = vectors.astype(np.float32)
            length = np.linalg.norm(vectors, axis=1)
        if not ((length > TINY) & np.isfinite(length)).all():
            raise UserError(f"{file}: a feature is zero, or too large for float32: embed anew")
        ids = [str(name) for name in names]
        _check_ids(ids, seen)
        yield Features(ids, vectors)


def _arrays(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Features and ids as a file has them, of any shape."""
    try:
        held = npz.read(file, "features", "ids")
    except npz.DAMAGED as error:
        why = npz.reason(error)
        raise UserError(
            f"{file}: no features and ids in it ({why}): make it with m2jax embed"
        ) from error
    return held["features"], held["ids"]


def read_features(files: Iterable[Path]) -> Features:
    """Features of several files, as one.

    Raises:
        UserError: as ``shards``, or no file.
    """
    parts = [*shards(files)]
    if not parts:
        raise UserError("--features: names no file: give at least one")
    vectors = np.concatenate([part.vectors for part in parts])
    return Features([name for part in parts for name in part.ids], vectors)


def in_order(features: Features, ids: Sequence[str]) -> Float32[np.ndarray, "items dim"]:
    """Unit vectors of the named items, which must be there."""
    place = {name: row for row, name in enumerate(features.ids)}
    return unit(features.vectors[[place[name] for name in ids]])


def _check_ids(ids: Sequence[str], seen: set[str]) -> None:
    """Adds them to those that were seen."""
    for name in ids:
        if not 0 < len(name.encode("utf-8", "replace")) <= ID_BYTES:
            raise UserError(f"id {name[:40]!r}: must have 1 to {ID_BYTES} bytes: shorten it")
        if UNSTORABLE.search(name):
            raise UserError(f"id {name[:40]!r}: has a character that cannot be stored: rename it")
        if name in seen:
            raise UserError(f"id {name[:40]!r}: comes twice: name each item once")
        seen.add(name)


def check_pace(batch: int, pause: float) -> None:
    """Whether a backfill can go at this pace.

    Raises:
        UserError: it cannot.
    """
    if batch < 1 or not 0 <= pause < math.inf:
        raise UserError(f"--batch {batch} --pause {pause}: at least 1, and 0 or more")


def is_older(version: str, other: str) -> bool:
    """Whether two versions' names differ in numbers alone and the first has the lower one."""
    first, second = (re.split(r"(\d+)", name) for name in (version, other))
    numbers = [[int(part) for part in parts[1::2]] for parts in (first, second)]
    return first[::2] == second[::2] and numbers[0] < numbers[1]


def backfill(
    store: Store,
    features: Features,
    version: str,
    *,
    batch: int = BATCH,
    pause: float = 0.0,
    say: Callable[[Progress], None] = lambda _: None,
    warn: Callable[[str], None] = lambda _: None,
) -> Progress:
    """Gives every item its vector of a version; goes on where an earlier run was cut off.

    Args:
        store: its collection must be there.
        features: of all items.
        version: of the model that made them.
        batch: items of one write.
        pause: seconds between writes, to leave the database to its searchers.
        say: hears of each batch.
        warn: is told, once and before it happens, that newer vectors are replaced.

    Raises:
        UserError: an item has this version already with another vector.
    """
    checked_version(version)
    check_pace(batch, pause)
    done, warned = Progress(0, 0, 0, 0), False
    for first in range(0, len(features.ids), batch):
        ids = features.ids[first : first + batch]
        vectors = unit(features.vectors[first : first + batch])
        there = store.read(ids)
        has = np.array([name in there and there[name].version == version for name in ids])
        for place in np.flatnonzero(has):
            if np.abs(there[ids[place]].vector - vectors[place]).max() > SAME:
                raise UserError(
                    f"{ids[place]}: has another vector of version {version} already: give the "
                    "new model a version of its own"
                )
        newer = sorted({row.version for row in there.values() if is_older(version, row.version)})
        if newer and not warned:
            warned = True
            warn(
                f"{store.name}: replaces vectors of version {newer[-1]} by those of {version}, "
                "which looks older: stop it if that is not meant"
            )
        todo = np.flatnonzero(~has)
        if len(todo):
            store.write([ids[place] for place in todo], vectors[todo], version)
        replaced = sum(ids[place] in there for place in todo)
        done = Progress(
            done.seen + len(ids),
            done.added + len(todo) - replaced,
            done.replaced + replaced,
            done.passed + int(has.sum()),
        )
        say(done)
        if pause and len(todo):
            time.sleep(pause)
    return done


def contents(store: Store) -> Contents:
    """Goes through a whole collection once."""
    return _sum_up((row.id, row.version, row.vector) for row in store.rows())


def expected(parts: Iterable[tuple[Features, str]]) -> Contents:
    """What a collection must hold that was filled with these, where later ones win."""
    newest: dict[str, tuple[str, np.ndarray]] = {}
    for features, version in parts:
        vectors = unit(features.vectors)
        newest |= {
            name: (version, vector) for name, vector in zip(features.ids, vectors, strict=True)
        }
    return _sum_up((name, version, vector) for name, (version, vector) in newest.items())


def _sum_up(rows: Iterable[tuple[str, str, np.ndarray]]) -> Contents:
    total, count, repeated, seen = 0, 0, 0, set()
    versions: dict[str, int] = {}
    for name, version, vector in rows:
        body = f"{name}\0{version}\0".encode() + np.asarray(vector, "<f4").tobytes()
        digest = hashlib.blake2b(body, digest_size=16).digest()
        total = (total + int.from_bytes(digest, "little")) % 2**128  # in any order
        repeated += name in seen
        seen.add(name)
        count += 1
        versions[version] = versions.get(version, 0) + 1
    return Contents(count, dict(sorted(versions.items())), f"{total:032x}", repeated)
