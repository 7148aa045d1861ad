# SPDX-License-Identifier: Apache-2.0
"""Third stage, where a model is given: every pair gets a score, and low ones another caption.

M2's data (BM-6B) kept pairs whose score lies below 0.25, with a caption written anew. What scores
and what writes are callables from outside, loaded in each worker: a captioner may be any program.
"""

from __future__ import annotations

import collections
import dataclasses
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import Float32
from PIL import Image

from m2jax.config import UserError
from m2jax.data.build import duplicates, stage_read, work
from m2jax.data.build.plan import Plan, Scoring
from m2jax.data.build.records import Caption, Record, Rejected, decode, encode
from m2jax.data.build.steps import normalised
from m2jax.data.image import open_image

LOW, REWRITTEN = "low score", "captions rewritten"
RECORDS, KEPT = "records.array_record", "kept.npz"


class Scorer(Protocol):
    """Says how well captions fit images."""

    def __call__(
        self, images: Sequence[Image.Image], texts: Sequence[str]
    ) -> Float32[np.ndarray, " n"]:
        """Cosine of each image with the text beside it, between -1 and 1."""
        ...


class Rewriter(Protocol):
    """Writes a caption from an image and the caption that it had."""

    def __call__(
        self, images: Sequence[Image.Image], texts: Sequence[str], languages: Sequence[str]
    ) -> Sequence[str]:
        """A caption per image, in its language; "" where it has none to offer."""
        ...


@dataclasses.dataclass(frozen=True)
class Models:
    """How a worker gets its models; both are pickled, so they load when they are called."""

    scorer: Callable[[], Scorer] | None = None
    rewriter: Callable[[], Rewriter] | None = None


def place(plan: Plan, ordinal: int) -> Path:
    """The folder of a unit."""
    return plan.work / "score" / f"{ordinal:06d}"


def reader(plan: Plan, ordinal: int) -> work.Reader:
    """The records of a unit that are left.

    Raises:
        UserError: there are fewer than were written.
    """
    folder = place(plan, ordinal)
    return work.Reader(folder / RECORDS, len(work.read_arrays(folder / KEPT)["rows"]))


def score_unit(plan: Plan, models: Models, ordinal: int, parts: int) -> dict[str, int]:
    """Scores what is left of a unit, unless that was done before; returns counts by reason."""
    target = place(plan, ordinal)
    if not (target / stage_read.COUNTS).exists():
        with work.folder(target) as folder:
            _fill(plan, models, ordinal, parts, folder)
    return work.read_json(target / stage_read.COUNTS)


def _fill(plan: Plan, models: Models, ordinal: int, parts: int, folder: Path) -> None:
    assert models.scorer is not None  # the pipeline has this stage only where there is one
    scorer = models.scorer()
    rewriter = models.rewriter() if models.rewriter else None
    reader = stage_read.reader(plan, ordinal)
    rows = left(len(reader), duplicates.gone(plan, parts, ordinal))
    counts: collections.Counter[str] = collections.Counter()
    kept: list[int] = []
    with (
        work.records(folder / RECORDS) as out,
        (folder / stage_read.SET_ASIDE).open("w", encoding="utf-8") as aside,
    ):
        for first in range(0, len(rows), plan.scoring.batch):
            batch = rows[first : first + plan.scoring.batch]
            found = [
                decode(data, f"row {row}")
                for row, data in zip(batch, reader.at(batch), strict=True)
            ]
            lowered = _low(score(found, scorer, plan.scoring.batch), plan.scoring, rewriter, counts)
            for row, record in zip(batch, lowered, strict=True):
                if isinstance(record, Rejected):
                    counts[record.reason] += 1
                    aside.write(stage_read.line(record))
                else:
                    kept.append(row)
                    out.write(encode(record))
    reader.close()
    work.write_arrays(folder / KEPT, rows=np.array(kept, np.int64))
    work.write_json(folder / stage_read.COUNTS, counts)


def left(count: int, gone: Sequence[duplicates.Found]) -> list[int]:
    """Rows of a unit that no earlier record repeats."""
    away = {found.rank & 0xFFFFFFFF for found in gone}
    return [row for row in range(count) if row not in away]


def _images(records: Sequence[Record]) -> list[Image.Image]:
    return [open_image(io.BytesIO(record.image), record.key) for record in records]


def score(records: Sequence[Record], scorer: Scorer, batch: int) -> list[Record]:
    """The records with a score at each caption; pairs go to the model ``batch`` at a time."""
    images = _images(records)
    pairs = [(i, c) for i, record in enumerate(records) for c in record.captions]
    scores: list[float] = []
    for first in range(0, len(pairs), batch):
        part = pairs[first : first + batch]
        found = scorer([images[i] for i, _ in part], [c.text for _, c in part])
        scores += map(float, found)
    if len(scores) != len(pairs) or not np.isfinite(scores).all():
        raise UserError("--score-model: gave no finite score for each pair: try another model")
    by_record: list[list[Caption]] = [[] for _ in records]
    for (i, caption), value in zip(pairs, scores, strict=True):
        by_record[i].append(dataclasses.replace(caption, score=value))
    return [r.with_captions(tuple(c)) for r, c in zip(records, by_record, strict=True)]


def _low(
    records: Sequence[Record],
    rules: Scoring,
    rewriter: Rewriter | None,
    counts: collections.Counter[str],
) -> list[Record | Rejected]:
    """What becomes of the captions below the threshold."""
    if rules.low == "keep":
        return list(records)
    low = [(i, c) for i, r in enumerate(records) for c in r.captions if c.score < rules.below]
    if rules.low == "drop" or not low:
        return [_without(record, rules.below, counts) for record in records]
    assert rewriter is not None  # the command saw to it
    images = _images([records[i] for i, _ in low])
    texts = rewriter(images, [c.text for _, c in low], [c.language for _, c in low])
    better: dict[tuple[int, Caption], str] = {}
    for pair, text in zip(low, texts, strict=True):
        better[pair] = normalised(text)
    counts[REWRITTEN] += sum(map(bool, better.values()))
    rewritten = []
    for i, record in enumerate(records):
        captions = (_rewritten(c, better.get((i, c), "")) for c in record.captions)
        rewritten.append(record.with_captions(tuple(captions)))
    return rewritten


def _rewritten(caption: Caption, text: str) -> Caption:
    """The caption anew; as it was where there is no text. Its score is that of the original."""
    if not text:
        return caption
    return dataclasses.replace(caption, text=text, original=caption.text)


def _without(record: Record, below: float, counts: collections.Counter[str]) -> Record | Rejected:
    """The record without its low captions."""
    kept = tuple(c for c in record.captions if c.score >= below)
    if not kept:
        best = max(c.score for c in record.captions)
        return Rejected(record.key, LOW, f"{best:.3f} at best")
    if len(kept) < len(record.captions):
        counts[f"caption: {LOW}"] += len(record.captions) - len(kept)
    return record.with_captions(kept)
