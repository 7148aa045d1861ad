# SPDX-License-Identifier: Apache-2.0
"""Labelled images for compatible training, and an old model's vectors of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from m2jax.config import UserError
from m2jax.data.emoji.split import fraction
from m2jax.eval.sets.records import Files, Some
from m2jax.tasks.embedder import Embedder
from m2jax.tasks.reid import evaluate, readers
from m2jax.tasks.reid.metrics import Labels
from m2jax.tasks.reid.readers import Split
from m2jax.tasks.retrieval.backfill import shards
from m2jax.tasks.retrieval.landmarks import gldv2_train
from m2jax.tasks.retrieval.train_compatible import Labelled, Stored, known_first

GLDV2 = "gldv2"
LAYOUTS = (GLDV2, *readers.LAYOUTS)


def read(layout: str, root: Path | None) -> Labelled:
    """A training set by the name of its layout; a class is an identity or a landmark.

    Args:
        layout: one of ``LAYOUTS``; GLDv2's is a folder with ``train_clean.csv`` and the images.
        root: the folder.

    Raises:
        UserError: as the readers.
    """
    if layout == GLDV2:
        if root is None:
            raise UserError("--layout gldv2: name the folder of train_clean.csv with --data DIR")
        found = gldv2_train(root / "train_clean.csv", root)
        return Labelled(Files(found.files), found.labels, found.landmarks)
    if layout not in LAYOUTS:
        raise UserError(f"--layout {layout}: use one of {', '.join(LAYOUTS)}")
    train = readers.read(layout, root).train
    labels = train.labels.identities
    return Labelled(train.images, labels, [str(n) for n in range(int(labels.max()) + 1)])


def some_classes(data: Labelled, share: float) -> Labelled:
    """A share of the classes, always the same ones: what an older model may have been trained on.

    Raises:
        UserError: a share that leaves fewer than two.
    """
    kept = [n for n, name in enumerate(data.names) if fraction(f"class {name}") < share]
    if len(kept) < 2:
        raise UserError(f"--classes {share}: leaves {len(kept)} classes: raise it")
    rows = np.flatnonzero(np.isin(data.labels, kept))
    labels = np.searchsorted(kept, data.labels[rows])
    if isinstance(data.images, Files):  # which vectors are found for by their paths
        images = Files([data.images.paths[row] for row in rows.tolist()])
    else:
        images = Some(data.images, rows.tolist())
    return Labelled(images, labels, [data.names[n] for n in kept])


def stored_by(
    old: Embedder, data: Labelled, *, batch: int = 64, say: Callable[[int], None] = lambda _: None
) -> tuple[Labelled, Stored]:
    """The set with the old model's classes first, and its vectors of all images.

    Raises:
        UserError: a model that is not of compatible training, or of classes the set has not.
    """
    known = old.report.get("classes")
    if not isinstance(known, list) or old.classifier is None:
        raise UserError(
            "--old: was not made by m2jax retrieval train-compatible: name one that was"
        )
    data = known_first(data, list(map(str, known)))
    side = Split(data.images, Labels(data.labels, np.zeros_like(data.labels)))
    vectors = evaluate.embed(old, side, batch, say)
    return data, Stored(vectors, len(known), old.classifier)


def stored_in(
    files: Sequence[Path], data: Labelled, known: Sequence[str] | None
) -> tuple[Labelled, Stored]:
    """The same from files of ``m2jax embed``, read one at a time; ids are the images' paths.

    Args:
        files: of features.
        data: images in files.
        known: classes that the old model was trained on; all that have vectors if not given.

    Raises:
        UserError: a set that lies in no files, or none of its images has a vector.
    """
    if not isinstance(data.images, Files):
        raise UserError("--old-features: this set lies in no files: name the old model by --old")
    place: dict[str, list[int]] = {}
    for row, path in enumerate(data.images.paths):
        place.setdefault(str(path.absolute()), []).append(row)
    vectors, there = np.zeros((len(data.labels), 0), np.float32), np.zeros(len(data.labels), bool)
    for shard in shards(files):
        if not vectors.shape[1]:
            vectors = np.zeros((len(there), shard.vectors.shape[1]), np.float32)
        for name, vector in zip(shard.ids, shard.vectors, strict=True):
            rows = place.get(str(Path(name).absolute()), [])
            vectors[rows], there[rows] = vector, True
    if not there.any():
        raise UserError(
            f"{files[0]}: no id is the path of an image of the set: embed its images where they lie"
        )
    if known is None:
        known = [data.names[n] for n in np.unique(data.labels[there]).tolist()]
    return known_first(data, known), Stored(vectors, len(known))
