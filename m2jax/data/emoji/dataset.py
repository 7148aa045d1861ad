# SPDX-License-Identifier: Apache-2.0
"""Reads the built data set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int32, UInt8

from m2jax.config import UserError
from m2jax.data.emoji.build import MANIFEST, checksums, ensure
from m2jax.data.emoji.concepts import Concept
from m2jax.data.emoji.packages import STYLES, VERSION, attribution
from m2jax.data.home import data_home


@dataclass(frozen=True)
class Drawings:
    """Drawings with what they show."""

    images: UInt8[np.ndarray, "n 64 64 4"]  # straight-alpha RGBA
    concept: Int32[np.ndarray, " n"]
    style: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.concept)

    def where(self, chosen: np.ndarray) -> Drawings:
        """The drawings a boolean array or an index array picks."""
        index = np.flatnonzero(chosen) if chosen.dtype == np.bool_ else chosen
        return Drawings(
            self.images[index], self.concept[index], tuple(self.style[i] for i in index)
        )


@dataclass(frozen=True)
class EmojiData:
    """The data set in memory (about 180 MB of pixels when every split has been read)."""

    directory: Path
    concepts: tuple[Concept, ...]
    tokenizer_model: bytes
    _splits: dict[str, Drawings] = field(default_factory=dict)

    @property
    def attribution(self) -> str:
        """Who drew what, under which licence."""
        return attribution()

    def drawings(self, split: str, *, hold_out_styles: tuple[str, ...] = ()) -> Drawings:
        """One split.

        Args:
            split: train, validation, fluent (test A) or openmoji (test B).
            hold_out_styles: training styles that count as validation instead, for tuning.

        Raises:
            UserError: an unknown split or style.
        """
        unknown = set(hold_out_styles) - {s.name for s in STYLES if s.split == "train"}
        if unknown:
            raise UserError(f"data.hold_out_styles: {sorted(unknown)[0]!r} is no training style")
        if split in ("fluent", "openmoji") or not hold_out_styles:
            return self._read(split)
        training = self._read("train")
        held = np.isin(training.style, hold_out_styles)
        return training.where(held if split == "validation" else ~held)

    def training_styles(self) -> Drawings:
        """Every drawing of a seen concept in a training style, held out for validation or not."""
        parts = [self._read("train"), self._read("validation")]
        return Drawings(
            np.concatenate([p.images for p in parts]),
            np.concatenate([p.concept for p in parts]),
            parts[0].style + parts[1].style,
        )

    def answers(self, drawings: Drawings) -> list[frozenset[int]]:
        """Concepts that count as right for each drawing of one split.

        Drawings of one vendor that are pixel-identical at 64 px show one thing under several names
        (gendered pairs, families); no model can tell them apart.
        """
        same: dict[tuple[str, bytes], set[int]] = {}
        keys = []
        for image, concept, style in zip(
            drawings.images, drawings.concept, drawings.style, strict=True
        ):
            keys.append((style, hashlib.sha256(image.tobytes()).digest()))
            same.setdefault(keys[-1], set()).add(int(concept))
        return [frozenset(same[key]) for key in keys]

    def is_seen(self, drawings: Drawings) -> np.ndarray:
        """For each drawing, whether training styles show its concept."""
        return np.array([self.concepts[i].seen for i in drawings.concept], np.bool_)

    def _read(self, split: str) -> Drawings:
        if split not in self._splits:
            self._splits[split] = _read_split(self.directory, split)
        return self._splits[split]


def default_directory(data_dir: str = "") -> Path:
    """Where the set lies: under ``data_dir``, else $M2JAX_DATA, else ~/.cache/m2jax."""
    return data_home(data_dir) / f"emoji-{VERSION}"


def load(directory: Path | None = None) -> EmojiData:
    """Reads the set, building it first where it is not there; checks every file's checksum.

    Raises:
        UserError: it cannot be built, or a file is missing or altered.
    """
    directory = ensure(directory or default_directory())
    _check(directory)
    rows = json.loads((directory / "concepts.json").read_text(encoding="utf-8"))
    return EmojiData(
        directory,
        tuple(_concept(row) for row in rows),
        (directory / "tokenizer.model").read_bytes(),
    )


def _check(directory: Path) -> None:
    try:
        expected: Mapping[str, str] = json.loads((directory / MANIFEST).read_text())
        found = checksums(directory)
    except (OSError, ValueError) as error:
        raise UserError(f"{directory}: {error}: {_MEND}") from error
    for name in sorted(set(expected) | set(found)):
        if expected.get(name) != found.get(name):
            raise UserError(f"{directory}/{name}: missing or altered since it was built: {_MEND}")


_MEND = "run `m2jax data build emoji --force`"


def _concept(row: dict) -> Concept:
    keywords = {lang: tuple(words) for lang, words in row["keywords"].items()}
    return Concept(**{**row, "keywords": keywords})


def _read_split(directory: Path, split: str) -> Drawings:
    source_dir = next(iter(sorted(directory.glob("*/*/dataset_info.json"))), None)
    if source_dir is None:
        raise UserError(f"{directory}: holds no records: {_MEND}")
    builder = tfds.builder_from_directory(str(source_dir.parent))
    if split not in builder.info.splits:
        raise UserError(f"emoji split {split!r}: unknown: use one of {sorted(builder.info.splits)}")
    # The decorator of as_data_source hides its parameters from type checkers.
    rows = list(builder.as_data_source(split=split))  # pyright: ignore[reportCallIssue]
    rows.sort(key=lambda row: (row["style"], row["concept"]))
    return Drawings(
        np.stack([row["image"] for row in rows]),
        np.array([row["concept"] for row in rows], np.int32),
        tuple(_text(row["style"]) for row in rows),
    )


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
