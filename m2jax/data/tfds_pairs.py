# SPDX-License-Identifier: Apache-2.0
"""Image-text pairs of a TFDS data set in ArrayRecord files, without TensorFlow.

The image is the data set's one image feature. Texts are its text features, alone or in sequences; a
name that is ``zh`` or ``en``, or ends so (``caption_zh``), says their language. Labels become texts
by their names.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from m2jax.config import UserError
from m2jax.data.image import open_image
from m2jax.data.pairs import Pair

LANGUAGES = ("en", "zh")
NOT_TEXTS = ("id", "key", "url", "file", "licence", "license", "source", "language")


class TfdsPairs:
    """One split of a data set.

    Args:
        folders: the one folder that holds ``features.json`` (NAME/VERSION).
        split: TFDS's word for it, such as ``train`` or ``train[:1000]``.
        language: of texts whose feature does not say theirs.
        at_least: as for ``open_image``.

    Raises:
        UserError: no such data set or split, another file format, no image or no text in it.
    """

    def __init__(
        self, folders: Sequence[Path], split: str, *, language: str, at_least: int = 0
    ) -> None:
        if len(folders) != 1:
            raise UserError(f"data.files: {len(folders)} folders: a TFDS source is one: name it")
        (self._folder,) = folders
        self._split, self._at_least = split, at_least
        self._open()
        self._image, self._texts = _columns(self._info.features, self._folder, language)

    def _open(self) -> None:
        try:
            builder = tfds.builder_from_directory(str(self._folder))
            self._info = builder.info
            image = next((n for n, f in _items(self._info.features) if _is_image(f)), "")
            skip = {image: tfds.decode.SkipDecoding()} if image else None
            # The decorator of as_data_source hides its parameters from type checkers.
            opened: Any = builder.as_data_source
            self._rows: Any = opened(split=self._split, decoders=skip)
        except Exception as error:  # TFDS raises many kinds, for a missing folder too
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(
                f"{self._folder}: no TFDS data set in ArrayRecord files with split "
                f"{self._split!r} ({lines[0]:.200}): name the folder of a version"
            ) from error

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, row: int) -> Pair:
        """One example; see ``Pairs``."""
        where = f"{self._folder}: {self._split}[{row}]"
        try:
            example = self._rows[row]
        except Exception as error:
            raise UserError(f"{where}: unreadable ({error}): copy the files again") from error
        texts: dict[str, tuple[str, ...]] = {}
        for name, (language, labels) in self._texts.items():
            said = tuple(t for t in map(str.strip, _strings(example[name], labels)) if t)
            if said:
                texts[language] = (*texts.get(language, ()), *said)
        data = io.BytesIO(example[self._image])
        return Pair(open_image(data, where, at_least=self._at_least), texts)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": None, "_info": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


def _items(features: Any) -> Iterable[tuple[str, Any]]:
    return features.items()


def _is_image(feature: Any) -> bool:
    return isinstance(feature, tfds.features.Image)


# By feature: its language, and the names of its labels where it is one.
Texts = Mapping[str, tuple[str, tuple[str, ...]]]


def _columns(features: Any, folder: Path, language: str) -> tuple[str, Texts]:
    """The image feature and the text features."""
    images = [name for name, feature in _items(features) if _is_image(feature)]
    texts: dict[str, tuple[str, tuple[str, ...]]] = {}
    for name, feature in _items(features):
        inner = getattr(feature, "feature", feature)  # of a sequence
        last = name.replace("-", "_").rsplit("_", 1)[-1]
        said = last if last in LANGUAGES else language
        if isinstance(inner, tfds.features.ClassLabel):
            texts[name] = said, tuple(label.replace("_", " ") for label in inner.names)
        elif isinstance(inner, tfds.features.Text) and last not in NOT_TEXTS:
            texts[name] = said, ()
    if len(images) != 1 or not texts:
        raise UserError(
            f"{folder}: features {sorted(features)}: needs one image and a text or label: build "
            "shards of it instead"
        )
    return images[0], texts


def _strings(value: Any, labels: tuple[str, ...]) -> list[str]:
    """The texts of a feature."""
    values = value if isinstance(value, (list, tuple)) or getattr(value, "ndim", 0) else [value]
    if labels:
        return [labels[int(v)] for v in values if int(v) >= 0]  # -1: no label is known
    return [v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v) for v in values]
