# SPDX-License-Identifier: Apache-2.0
"""TFDS data sets by name, read at random from their ArrayRecord files; TensorFlow is not needed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import tensorflow_datasets as tfds

from m2jax.config import UserError


class Rows(Protocol):
    """Records by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Mapping[str, Any]: ...


class TfdsSplit(NamedTuple):
    """One split."""

    rows: Rows
    features: Mapping[str, Any]  # TFDS's description of each field


def open_split(name: str, split: str, directory: Path | None = None) -> TfdsSplit:
    """A split of a data set that lies prepared in ``directory``; nothing is downloaded.

    Args:
        name: as TFDS writes it, ``mnist`` or ``cars196:2.1.0``; or empty: ``directory`` is the
            folder of one version.
        split: such as test, or ``test[:100]``.
        directory: TFDS's data folder; its default if not given.

    Raises:
        UserError: it is not there, was not written as ArrayRecord, or has no such split.
    """
    where = f"tfds:{name}" if name else str(directory)
    try:
        if name:
            builder = tfds.builder(name, data_dir=directory, file_format="array_record")
        else:
            builder = tfds.builder_from_directory(str(directory))
        rows = builder.as_data_source(split=split)  # pyright: ignore[reportCallIssue]
        features = builder.info.features
    except Exception as error:  # TFDS's errors have no common base
        reason = str(error).strip().splitlines()
        raise UserError(
            f"{where}: split {split!r} cannot be read ({type(error).__name__}: "
            f"{' '.join(reason[:1])[:200]}): prepare it: tfds build --file_format=array_record"
        ) from error
    if not isinstance(features, tfds.features.FeaturesDict):
        raise UserError(f"{where}: records have no fields: use an image data set")
    return TfdsSplit(rows, dict(features.items()))
