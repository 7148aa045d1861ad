# SPDX-License-Identifier: Apache-2.0
"""What is to be built, in one value that every worker gets."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m2jax.config import UserError
from m2jax.data.build import readers
from m2jax.data.build.readers.base import Source, Unit
from m2jax.data.build.readers.tsv64 import texts_of
from m2jax.data.build.steps import LANGUAGES, Limits

NEAR = ("both", "image", "text", "none")
LOW_SCORES = ("rewrite", "drop", "keep")
FORMAT = 2  # of the work folder and the manifest


@dataclass(frozen=True)
class Duplicates:
    """When two records show the same."""

    near: str = "both"  # of image and text must be alike: both | image | text | none
    image_bits: int = 28  # of 256 in which alike images' hashes differ, at most
    jaccard: float = 0.7  # of the shingles of alike captions, at least
    evaluation_text: int = 30  # letters (Han: 3 each) of a caption whose sharing is no chance
    pass_records: int = 20_000  # records whose signatures Beam shuffles at a time; 0: all


@dataclass(frozen=True)
class Scoring:
    """What becomes of pairs that a model finds unlike."""

    model: str = ""  # names the scorer, for the manifest; "": nothing is scored
    captioner: str = ""
    below: float = 0.25  # cosine; M2's data were rewritten below it
    low: str = "keep"  # rewrite | drop | keep
    batch: int = 64


@dataclass(frozen=True)
class Plan:
    """A build."""

    out: Path
    sources: tuple[Source, ...]
    limits: Limits = field(default_factory=Limits)
    duplicates: Duplicates = field(default_factory=Duplicates)
    scoring: Scoring = field(default_factory=Scoring)
    shard_records: int = 10_000  # of a shard, about
    seed: int = 0  # of the order of the shards

    @property
    def work(self) -> Path:
        """Where the stages leave their files; gone when the build is done."""
        return self.out / ".work"

    def settings(self) -> dict[str, Any]:
        """What the result depends on, as the manifest holds it."""
        duplicates = dataclasses.asdict(self.duplicates)
        del duplicates["pass_records"]  # only memory and time
        scoring = dataclasses.asdict(self.scoring)
        del scoring["batch"]
        return {
            "format": FORMAT,
            "limits": dataclasses.asdict(self.limits),
            "duplicates": duplicates,
            "scoring": scoring,
            "shard_records": self.shard_records,
            "seed": self.seed,
        }


def fingerprint(plan: Plan) -> str:
    """Of settings and inputs: a half-done build may go on where this is the same."""
    inputs = [
        {
            **source._asdict(),
            "files": [[source.label(file), *_state(file)] for file in source.files],
        }
        for source in plan.sources
    ]
    text = json.dumps([plan.settings(), inputs], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _state(file: Path) -> tuple[int, int]:
    """Size and time of change of a file and of the texts beside it, or of the files of a folder."""
    files = [file, texts_of(file)] if file.is_file() else sorted(file.rglob("*.mdb"))
    files = [f for f in dict.fromkeys(files) if f.is_file()]
    stats = [f.stat() for f in files]
    return sum(s.st_size for s in stats), max((s.st_mtime_ns for s in stats), default=0)


def check(plan: Plan) -> None:
    """Refuses a plan that cannot be.

    Raises:
        UserError: a value out of its choices or range, or no source to build from.
    """
    duplicates, scoring = plan.duplicates, plan.scoring
    for flag, value, choices in (
        ("--near", duplicates.near, NEAR),
        ("--low-score", scoring.low, LOW_SCORES),
        ("--script", plan.limits.script, ("simplified", "traditional", "keep")),
    ):
        if value not in choices:
            raise UserError(f"{flag} {value}: unknown: use one of {', '.join(choices)}")
    for flag, value, least, most in (
        ("--aspect", plan.limits.aspect, 1.0, 1000.0),
        ("--min-side", plan.limits.min_side, 1, 10_000),
        ("--min-text", plan.limits.min_text, 1, 10_000),
        ("--max-text", plan.limits.max_text, plan.limits.min_text, 10**6),
        ("--image-bits", duplicates.image_bits, 0, 256),
        ("--jaccard", duplicates.jaccard, 0.0, 1.0),
        ("--pass-records", duplicates.pass_records, 0, 10**12),
        ("--score-below", scoring.below, -1.0, 1.0),
        ("--shard-records", plan.shard_records, 1, 10**9),
    ):
        if not least <= value <= most:
            raise UserError(f"{flag} {value}: must lie between {least:,} and {most:,}")
    if not any(not source.evaluation for source in plan.sources):
        raise UserError("--source: none given: name collections, as in laion=tars:data/*.tar")
    names = [source.name for source in plan.sources]
    if len(set(names)) != len(names):
        raise UserError(f"--source: names {names}: two are equal: change one")
    for source in plan.sources:
        if not 0 <= source.weight <= 100:
            raise UserError(f"--source {source.name}: weight {source.weight}: from 0 to 100")
        if source.language not in ("", *LANGUAGES):
            raise UserError(
                f"--language {source.name}={source.language}: only {' and '.join(LANGUAGES)} are "
                "kept: name one of these, or none to have captions identified"
            )


def units(plan: Plan) -> list[Unit]:
    """All units of work in the order that ranks duplicates: evaluation first, then as named.

    Raises:
        UserError: a file cannot be opened.
    """
    found = []
    order = sorted(range(len(plan.sources)), key=lambda i: not plan.sources[i].evaluation)
    for index in order:
        source, number = plan.sources[index], 0
        reader = readers.reader(source.kind)
        for file in source.files:
            for span in reader.units(file):
                found.append(Unit(index, number, file, dict(span)))
                number += 1
    return found
