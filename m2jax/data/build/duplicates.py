# SPDX-License-Identifier: Apache-2.0
"""Second stage: which records show what an earlier one, or an evaluation set, shows already.

A locality-sensitive join in Beam. Signatures are cut into bands; records that agree in a whole band
meet in one group, where they are compared bit by bit. The rule is local, so no clusters have to be
grown: a record goes if one that stands before it (in the order of the sources and their files) is
its duplicate. Of a chain of look-alikes the first stays.

A runner in memory would hold the signatures of all records at once; passes over a part of the
values of each band (``Duplicates.pass_records``) keep that flat.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import apache_beam as beam
import numpy as np
from apache_beam.metrics import Metrics

from m2jax.data.build import signatures, stage_read, work
from m2jax.data.build.plan import Duplicates, Plan

BANDS = 16  # of 16 bits of the image's hash, or of 4 bytes of the text's
EXACT, NEAR = "exact duplicate", "near duplicate"
EVALUATION_IMAGE, EVALUATION_TEXT = "evaluation image", "evaluation text"
REASONS = (EVALUATION_IMAGE, EVALUATION_TEXT, EXACT, NEAR)  # of several, the first counts
GROUP_ROWS = 20_000  # of a group that all others are compared with: flat pictures are alike
BLOCK = 256  # rows compared at a time
_KEY = struct.Struct(">BBQ")  # kind, band, value

# A member of a group: rank (unit and row), then the image's and the text's signatures. Evaluation
# units come first, so that "before" is one comparison.
_MEMBER = np.dtype(
    [("rank", "<u8"), ("evaluation", "u1"), ("image", "u1", 32), ("text", "u1", signatures.MINIMA)]
)
_EXACT, _IMAGE, _TEXT, _LONG = range(4)


class Found(NamedTuple):
    """One record that goes."""

    rank: int
    reason: int  # index into REASONS
    of: int  # rank of what it repeats


def rank(ordinal: int, row: int) -> int:
    """The place of a record in the order of the build."""
    return ordinal << 32 | row


class Members(beam.DoFn):
    """``duplicates/members``: a unit's records under the key of each of their bands."""

    def __init__(self, plan: Plan, part: int, parts: int) -> None:
        self._plan, self._part, self._parts = plan, part, parts

    def process(self, element: tuple[int, bool]) -> Iterator[tuple[bytes, bytes]]:
        """(ordinal, of an evaluation set) -> (key, member)."""
        ordinal, evaluation = element
        file = stage_read.place(self._plan, ordinal) / stage_read.SIGNATURES
        arrays = work.read_arrays(file)
        members = np.zeros(len(arrays["exact"]), _MEMBER)
        members["rank"] = np.uint64(ordinal << 32) + np.arange(len(members), dtype=np.uint64)
        members["evaluation"] = evaluation
        members["image"], members["text"] = arrays["image"], arrays["text"]
        for kind, band, values, rows in _keys(arrays, self._plan.duplicates, evaluation):
            mine = np.flatnonzero(_mixed(values) % np.uint64(self._parts) == self._part)
            for at in mine:
                key = _KEY.pack(kind, band, int(values[at]))
                yield key, members[rows[at]].tobytes()


def _keys(
    arrays: dict[str, np.ndarray], rules: Duplicates, evaluation: bool
) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
    """Kind, band, values and their rows."""
    rows = np.arange(len(arrays["exact"]))
    if not evaluation:
        yield _EXACT, 0, arrays["exact"], rows
    long = arrays["long"]
    yield _LONG, 0, long[:, 1], long[:, 0].astype(np.int64)
    bands = np.ascontiguousarray(arrays["image"]).view("<u2")
    for band in range(BANDS):
        yield _IMAGE, band, bands[:, band].astype(np.uint64), rows
    if rules.near == "text" and not evaluation:
        bands = np.ascontiguousarray(arrays["text"]).view("<u4")
        for band in range(BANDS):
            yield _TEXT, band, bands[:, band].astype(np.uint64), rows


def _mixed(values: np.ndarray) -> np.ndarray:
    """Values spread evenly, whatever their lower bits are."""
    return (values * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)


class Compare(beam.DoFn):
    """``duplicates/compare``: the records of a group that repeat an earlier one of it."""

    def __init__(self, rules: Duplicates) -> None:
        self._rules = rules
        self._crowded = Metrics.counter("m2jax.build", "crowded groups")

    def process(self, element: tuple[bytes, Iterable[bytes]]) -> Iterator[tuple[int, Found]]:
        """(key, members) -> (unit's ordinal, what goes)."""
        key, group = element
        joined = b"".join(group)
        if len(joined) == _MEMBER.itemsize:
            return
        members = np.frombuffer(joined, _MEMBER)
        members = members[np.argsort(members["rank"], kind="stable")]
        if len(members) > GROUP_ROWS:
            self._crowded.inc()
        for found in compare(_KEY.unpack(key)[0], members, self._rules):
            yield found.rank >> 32, found


def compare(kind: int, members: np.ndarray, rules: Duplicates) -> Iterator[Found]:
    """What goes of a group, which is sorted by rank.

    Past ``GROUP_ROWS`` members, later ones are compared with the first that many alone.
    """
    ranks = members["rank"]
    if kind in (_EXACT, _LONG):
        is_test = members["evaluation"].astype(bool)
        if kind == _LONG and not is_test[0]:
            return
        reason = EXACT if kind == _EXACT else EVALUATION_TEXT
        for place in np.flatnonzero(~is_test):
            if place:
                yield Found(int(ranks[place]), REASONS.index(reason), int(ranks[0]))
        return
    for first in range(0, len(members), BLOCK):
        block = members[first : first + BLOCK]
        earlier = members[: min(first + len(block), GROUP_ROWS)]
        yield from _block(block, earlier, first, rules)


def _block(
    block: np.ndarray, earlier: np.ndarray, first: int, rules: Duplicates
) -> Iterator[Found]:
    """Rows of a group, which begin at ``first``, against those before each."""
    places = first + np.arange(len(block))
    before = np.arange(len(earlier)) < places.reshape(-1, 1)
    near = signatures.distances(block["image"].copy(), earlier["image"].copy()) <= rules.image_bits
    test = earlier["evaluation"].astype(bool)
    seen = np.asarray((near & test).any(axis=1))
    if rules.near == "text":
        pairs = before & ~test
    elif rules.near == "none":
        pairs = np.zeros_like(before)
    else:
        pairs = before & near & ~test
    if rules.near in ("both", "text"):
        rows, columns = np.nonzero(pairs)
        alike = signatures.jaccard(block["text"][rows], earlier["text"][columns]) >= rules.jaccard
        pairs[rows[~alike], columns[~alike]] = False
    ranks = earlier["rank"]
    for row in np.flatnonzero((block["evaluation"] == 0) & (seen | pairs.any(axis=1))):
        if seen[row]:
            reason, of = EVALUATION_IMAGE, ranks[np.argmax(near[row] & test)]
        else:
            reason, of = NEAR, ranks[np.argmax(pairs[row])]
        yield Found(int(block["rank"][row]), REASONS.index(reason), int(of))


class Write(beam.DoFn):
    """``duplicates/write``: what goes of a unit, as one small file per unit and pass."""

    def __init__(self, plan: Plan, part: int, parts: int) -> None:
        self._plan, self._part, self._parts = plan, part, parts

    def process(self, element: tuple[int, Iterable[Found]]) -> Iterator[tuple[str, int]]:
        """(ordinal, what goes) -> counts by reason."""
        ordinal, found = element
        rows = chosen(found)
        target = place(self._plan, self._part, self._parts, ordinal)
        with work.folder(target) as folder:
            work.write_arrays(folder / "gone.npz", gone=np.array(rows, np.uint64).reshape(-1, 3))
        for row in rows:
            yield REASONS[row.reason], 1


def chosen(found: Iterable[Found]) -> list[Found]:
    """One finding per record: of several the first reason, and of that the earliest record."""
    best: dict[int, Found] = {}
    for one in found:
        kept = best.get(one.rank)
        if kept is None or (one.reason, one.of) < (kept.reason, kept.of):
            best[one.rank] = one
    return [best[key] for key in sorted(best)]


def place(plan: Plan, part: int, parts: int, ordinal: int) -> Path:
    """The folder of a pass's findings of a unit."""
    return plan.work / "duplicates" / f"pass-{part:04d}-of-{parts:04d}" / f"{ordinal:06d}"


def gone(plan: Plan, parts: int, ordinal: int) -> list[Found]:
    """All that goes of a unit, over the passes."""
    found: list[Found] = []
    for part in range(parts):
        file = place(plan, part, parts, ordinal) / "gone.npz"
        if file.exists():
            found += (Found(*map(int, row)) for row in work.read_arrays(file)["gone"])
    return chosen(found)


def find(
    pipeline: beam.Pipeline, plan: Plan, units: list[tuple[int, bool]], part: int, parts: int
) -> None:
    """One pass over all units; ``units`` are their ordinals and whether they are of evaluation."""
    _ = (
        pipeline
        | "units" >> beam.Create(units)
        | "spread" >> beam.Reshuffle()
        | "members" >> beam.ParDo(Members(plan, part, parts))
        | "meet" >> beam.GroupByKey()
        | "compare" >> beam.ParDo(Compare(plan.duplicates))
        | "by unit" >> beam.GroupByKey()
        | "write" >> beam.ParDo(Write(plan, part, parts))
    )
