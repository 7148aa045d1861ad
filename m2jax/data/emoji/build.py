# SPDX-License-Identifier: Apache-2.0
"""Builds the data set: fetch, map, render, split, write (TFDS, ArrayRecord, no TensorFlow).

The folder appears whole or not at all: everything is written into a sibling and renamed at the end.
``manifest.json`` holds a checksum of every file.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from m2jax.config import UserError
from m2jax.data.emoji import concepts as concepts_lib
from m2jax.data.emoji import fetch, split
from m2jax.data.emoji.concepts import Concept
from m2jax.data.emoji.packages import NAMES, STYLES, VERSION, attribution
from m2jax.data.emoji.render import SIDE, render
from m2jax.data.text import train_tokenizer

MANIFEST = "manifest.json"
TOKENIZER_VOCAB = 4000


class Sources(NamedTuple):
    """What the packages hold, joined."""

    concepts: list[Concept]
    icons: dict[str, Mapping[str, Any]]  # Iconify collection by style
    drawn: dict[str, dict[int, str]]  # concept id -> icon name, by style


def ensure(directory: Path, say: Callable[[str], None] = print, *, force: bool = False) -> Path:
    """The data set's folder, built first if it is not there (or if ``force``).

    Two processes may call this at once: the second waits for the first and finds it done.

    Raises:
        UserError: no npm, no network, altered packages, or a folder that cannot be written.
    """
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with _lock(directory.with_name(directory.name + ".lock")):
            if force or not (directory / MANIFEST).exists():
                _build(directory, say)
    except OSError as error:
        raise UserError(
            f"emoji data: {error.filename or directory}: {error.strerror}: "
            "free some space or point data.dir somewhere writable"
        ) from error
    return directory


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on a file; freed by the system if the process dies."""
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _build(directory: Path, say: Callable[[str], None]) -> None:
    temporary = Path(tempfile.mkdtemp(prefix=directory.name + ".", dir=directory.parent))
    try:
        sources = read_sources(temporary / "packages", say)
        shutil.rmtree(temporary / "packages")
        _write_records(temporary, sources, say)
        rows = [vars(concept) for concept in sources.concepts]
        (temporary / "concepts.json").write_text(json.dumps(rows, ensure_ascii=False, indent=0))
        (temporary / "ATTRIBUTION.md").write_text(attribution())
        say("emoji: training the tokenizer")
        (temporary / "tokenizer.model").write_bytes(_tokenizer(sources.concepts))
        (temporary / MANIFEST).write_text(json.dumps(checksums(temporary), indent=1))
        if directory.exists():
            shutil.rmtree(directory)
        os.replace(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    say(f"emoji: ready in {directory}")


def read_sources(folder: Path, say: Callable[[str], None]) -> Sources:
    """Fetches every package and joins icons with concepts."""
    folder.mkdir()
    total = len(STYLES) + 1
    say(f"emoji: package 1 of {total}: {NAMES.name} {NAMES.version}")
    members = {lang: f"{lang}/data.json" for lang in concepts_lib.LANGUAGES}
    found = concepts_lib.read_concepts(fetch.read_json(fetch.fetch(NAMES, folder), members))
    icons, chars = {}, {}
    for number, style in enumerate(STYLES, 2):
        say(f"emoji: package {number} of {total}: {style.package.name} {style.package.version}")
        archive = fetch.fetch(style.package, folder)
        parts = fetch.read_json(archive, {"icons": "icons.json", "chars": "chars.json"})
        icons[style.name], chars[style.name] = parts["icons"], parts["chars"]
    drawn = {s: concepts_lib.by_code_point(c, found) for s, c in chars.items() if c}
    votes = concepts_lib.name_votes(found, list(drawn.values()))
    for style in STYLES:
        if style.name not in drawn:
            collection = icons[style.name]
            names = [n for n in collection["icons"] if "tone" not in n.split("-")]
            drawn[style.name] = concepts_lib.by_name(names, _aliases(collection), votes)
    training = {s.name: drawn[s.name] for s in STYLES if s.split == "train"}
    return Sources(split.mark_unseen(found, training), icons, drawn)


def _aliases(collection: Mapping[str, Any]) -> dict[str, list[str]]:
    """Plain aliases (no turning or mirroring) of each icon."""
    found: dict[str, list[str]] = {}
    for alias, target in sorted(collection.get("aliases", {}).items()):
        if set(target) == {"parent"}:
            found.setdefault(target["parent"], []).append(alias)
    return found


def _write_records(directory: Path, sources: Sources, say: Callable[[str], None]) -> None:
    training = {s.name: sources.drawn[s.name] for s in STYLES if s.split == "train"}
    held = split.validation(sources.concepts, training)
    records: dict[str, list[dict[str, Any]]] = {}
    for number, style in enumerate(STYLES, 1):
        say(f"emoji: drawing {number} of {len(STYLES)}: {style.name}")
        for concept_id, icon in sorted(sources.drawn[style.name].items()):
            seen = sources.concepts[concept_id].seen
            if style.split == "train" and not seen:
                continue
            name = "validation" if (style.name, concept_id) in held else style.split
            image = render(sources.icons[style.name], icon)
            record = {"image": image, "concept": concept_id, "style": style.name}
            records.setdefault(name, []).append(record)
    # TFDS asks for a class per data set; what varies is only where the records come from.
    builder = Emoji(records, data_dir=str(directory), file_format="array_record")
    with contextlib.redirect_stdout(io.StringIO()):  # our own lines say what goes on
        builder.download_and_prepare()


class Emoji(tfds.core.GeneratorBasedBuilder):
    """Drawings of emoji by several vendors; names lie in ``concepts.json`` beside the records."""

    VERSION = tfds.core.Version(VERSION)
    code_path = None  # no checksum file lies beside this module; TFDS need not look for one

    def __init__(self, records: Mapping[str, list[dict[str, Any]]] | None = None, **kwargs: Any):
        self._records = records or {}
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Tensor(
                shape=(SIDE, SIDE, 4), dtype=np.uint8, encoding=tfds.features.Encoding.ZLIB
            ),
            "concept": tfds.features.Scalar(dtype=np.int32),
            "style": tfds.features.Text(),
        }
        return self.dataset_info_from_configs(
            description="Emoji as several vendors drew them, named in English and Chinese.",
            features=tfds.features.FeaturesDict(features),
            license=attribution(),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        return {name: self._generate_examples(rows) for name, rows in self._records.items()}

    def _generate_examples(self, rows: list[dict[str, Any]]) -> Iterator[tuple[int, Any]]:
        yield from enumerate(rows)


def _tokenizer(concepts: list[Concept]) -> bytes:
    """SentencePiece on every name (thrice, as they matter more) and keyword of both languages."""
    lines = []
    for concept in concepts:
        for lang in concepts_lib.LANGUAGES:
            lines += [concept.names[lang]] * 3 + list(concept.keywords[lang])
    return train_tokenizer(lines, TOKENIZER_VOCAB)


def checksums(directory: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder but the manifest itself, by relative path."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
