# SPDX-License-Identifier: Apache-2.0
"""First stage: units are read, their records checked, and what passes is kept with signatures.

A unit's folder holds ``records.array_record``, ``signatures.npz``, ``set_aside.jsonl`` (what did
not pass, with its reason) and ``counts.json``.
"""

from __future__ import annotations

import collections
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from m2jax.data.build import readers, signatures, steps, work
from m2jax.data.build.plan import Plan
from m2jax.data.build.readers.base import Sample, Source, Unit
from m2jax.data.build.records import Caption, Record, Rejected, encode
from m2jax.data.text import well_formed

RECORDS, SIGNATURES = "records.array_record", "signatures.npz"
SET_ASIDE, COUNTS = "set_aside.jsonl", "counts.json"
READ, PASSED = "read", "passed"  # samples and what readers reject; checked records
THINNED = "thinned by weight"


def place(plan: Plan, ordinal: int) -> Path:
    """The folder of a unit."""
    return plan.work / "read" / f"{ordinal:06d}"


def reader(plan: Plan, ordinal: int) -> work.Reader:
    """The records of a unit.

    Raises:
        UserError: there are fewer than were written.
    """
    folder = place(plan, ordinal)
    return work.Reader(folder / RECORDS, work.read_json(folder / COUNTS).get(PASSED, 0))


def read_unit(plan: Plan, ordinal: int, unit: Unit) -> dict[str, int]:
    """Reads a unit, unless that was done before.

    Returns:
        Counts by reason; ``read`` counts samples and what the reader rejected, ``passed`` records,
        ``caption: ...`` captions dropped from records that passed.
    """
    target = place(plan, ordinal)
    if not (target / COUNTS).exists():
        with work.folder(target) as folder:
            _fill(plan, unit, folder)
    return work.read_json(target / COUNTS)


def _fill(plan: Plan, unit: Unit, folder: Path) -> None:
    source = plan.sources[unit.source]
    counts: collections.Counter[str] = collections.Counter()
    marks = _Marks(plan.duplicates.evaluation_text)
    # Files of one name in several folders must not give equal keys.
    folder_of = f"{source.name}/{source.label(unit.file).removesuffix(unit.file.name)}"
    with (
        work.records(folder / RECORDS) as out,
        (folder / SET_ASIDE).open("w", encoding="utf-8") as aside,
    ):
        for found in readers.reader(source.kind).read(unit, source):
            counts[READ] += 1
            for result in _results(plan, source, found, marks, folder_of):
                if isinstance(result, Rejected):
                    counts[result.reason] += 1
                    aside.write(line(result))
                elif result is None:
                    counts[THINNED] += 1
                else:
                    counts[PASSED] += 1
                    out.write(encode(result))
    work.write_arrays(folder / SIGNATURES, **marks.arrays())
    work.write_json(folder / COUNTS, counts)


def _results(
    plan: Plan, source: Source, found: Sample | Rejected, marks: _Marks, prefix: str
) -> Iterator[Record | Rejected | None]:
    """What becomes of a finding: at last a record, its rejection, or ``None`` where it is thinned.

    The lot of the weight is drawn first: a record that is not written must not take another with it
    as its duplicate.
    """
    if isinstance(found, Rejected):
        yield Rejected(prefix + found.key, found.reason, found.detail)
        return
    record = _record(found, source, prefix)
    if not source.evaluation and not copies(plan.seed, record.key, source.weight):
        yield None
        return
    try:
        for result in steps.checked(record, plan.limits, texts=not source.evaluation):
            if isinstance(result, Rejected):
                yield result
            else:
                marks.add(result)
                yield result.record
    except (ImportError, MemoryError):
        raise  # of this machine, not of the record
    except Exception as error:  # what a hostile image raises is anybody's guess
        yield Rejected(record.key, "undecodable image", steps.told(error))


def hashed(seed: int, key: str, copy: int) -> int:
    """Where a copy of a record stands in the shuffled order: 64 bits."""
    data = f"{seed}\0{copy}\0{key}".encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def copies(seed: int, key: str, weight: float) -> int:
    """How often a record is written: the weight, its fraction by the record's own lot."""
    whole = int(weight)
    lot = hashed(seed, f"lot\0{key}", 0) / 2**64
    return whole + (lot < weight - whole)


def _record(sample: Sample, source: Source, prefix: str) -> Record:
    """A sample as a record; lone surrogates, which UTF-8 cannot hold, become question marks."""
    captions = (Caption(well_formed(c.text), c.language) for c in sample.captions)
    return Record(
        well_formed(prefix + sample.key),
        sample.image,
        tuple(captions),
        source.name,
        source.licence,
        well_formed(sample.url),
    )


def line(rejected: Rejected) -> str:
    """A line of a set-aside file."""
    return json.dumps(vars(rejected), ensure_ascii=False).encode("utf-8", "replace").decode() + "\n"


class _Marks:
    """The signatures of a unit's records."""

    def __init__(self, evaluation_text: int) -> None:
        self._at_least = evaluation_text
        self._exact: list[int] = []
        self._image: list[np.ndarray] = []
        self._text: list[np.ndarray] = []
        self._long: list[tuple[int, int]] = []

    def add(self, looked: steps.Looked) -> None:
        """One more record."""
        row, record = len(self._exact), looked.record
        image = signatures.perceptual_hash(looked.image)  # may fail: nothing is added before
        text = signatures.minhash(record.captions)
        self._long += [(row, h) for h in signatures.text_hashes(record, self._at_least)]
        self._image.append(image)
        self._text.append(text)
        self._exact.append(signatures.exact(record))

    def arrays(self) -> dict[str, np.ndarray]:
        """``exact`` [n], ``image`` [n, 32], ``text`` [n, 64]; ``long`` [m, 2]: row, text's hash."""
        return {
            "exact": np.array(self._exact, np.uint64),
            "image": np.array(self._image, np.uint8).reshape(-1, signatures.IMAGE_BITS // 8),
            "text": np.array(self._text, np.uint8).reshape(-1, signatures.MINIMA),
            "long": np.array(self._long, np.uint64).reshape(-1, 2),
        }
