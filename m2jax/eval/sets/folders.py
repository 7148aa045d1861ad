# SPDX-License-Identifier: Apache-2.0
"""Pictures in folders: one folder per class, and the published layouts of CUB, Dogs and Cars.

Those three say in lists what is training and what is test; their English names of classes are
written a little plainer, Chinese ones come with ``--classes`` (no release has them).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from m2jax.config import UserError
from m2jax.eval import prompts
from m2jax.eval.sets import records
from m2jax.eval.sets.records import Files, Labelled, Place

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def read(place: Place) -> Labelled:
    """``FOLDER/SPLIT/CLASS/*`` or ``FOLDER/CLASS/*`` (ImageNet has classes by WordNet id).

    Raises:
        UserError: there are no such folders.
    """
    root = place.path / place.split
    root = root if place.asked or root.is_dir() else place.path
    folders = sorted(p for p in root.glob("*") if p.is_dir() and not p.name.startswith("."))
    paths, labels = list[Path](), list[int]()
    for number, folder in enumerate(folders):
        found = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
        paths += found
        labels += [number] * len(found)
    if not paths:
        raise UserError(f"{root}: holds no folders of images, one per class: name another folder")
    keys = [folder.name for folder in folders]
    return _labelled(place, paths, labels, keys, None, prompts.TEMPLATES)


def cub(place: Place) -> Labelled:
    """Caltech-UCSD Birds 200-2011: the folder with ``images.txt``.

    Raises:
        UserError: a list is missing or damaged.
    """
    lists = {
        name: _table(place.path / f"{name}.txt")
        for name in ("images", "image_class_labels", "train_test_split", "classes")
    }
    keys = list(lists["classes"].values())
    wanted = "1" if place.split == "train" else "0"
    paths, labels = [], []
    for number, name in lists["images"].items():
        if lists["train_test_split"].get(number) == wanted:
            where = f"{place.path}/images.txt: {number}"
            paths.append(records.inside(place.path / "images", name, where))
            labels.append(_index(lists["image_class_labels"].get(number), keys, where))
    names = [key.partition(".")[2].replace("_", " ") for key in keys]
    return _labelled(place, paths, labels, keys, names, prompts.BIRDS)


def dogs(place: Place) -> Labelled:
    """Stanford Dogs: the folder with ``Images`` and ``test_list.mat``.

    Raises:
        UserError: a list is missing or damaged.
    """
    split = "train" if place.split == "train" else "test"
    file = place.path / f"{split}_list.mat"
    found = _matlab(file, "file_list", "labels")
    files = [str(np.ravel(each)[0]) for each in np.ravel(found["file_list"])]
    numbers = np.ravel(found["labels"])
    folders = sorted(p.name for p in (place.path / "Images").glob("*") if p.is_dir())
    paths = [records.inside(place.path / "Images", name, str(file)) for name in files]
    labels = [_index(number, folders, str(file)) for number in numbers]
    names = [folder.partition("-")[2].replace("_", " ") for folder in folders]
    return _labelled(place, paths, labels, folders, names, prompts.DOGS)


def cars(place: Place) -> Labelled:
    """Stanford Cars: the folder with ``devkit``, ``cars_train`` and ``cars_test``.

    The labels of the test part, ``cars_test_annos_withlabels.mat``, may lie beside ``devkit`` or in
    it: the release gives them as a file of its own.

    Raises:
        UserError: a list is missing or damaged.
    """
    train = place.split == "train"
    name = "cars_train_annos.mat" if train else "cars_test_annos_withlabels.mat"
    beside, within = place.path / name, place.path / "devkit" / name
    file = beside if beside.is_file() else within
    meta = _matlab(place.path / "devkit" / "cars_meta.mat", "class_names")
    names = [str(np.ravel(each)[0]) for each in np.ravel(meta["class_names"])]
    rows = np.ravel(_matlab(file, "annotations")["annotations"])
    if rows.dtype.names is None or not {"fname", "class"} <= set(rows.dtype.names):
        raise UserError(f"{file}: annotations lack fname or class: take the file with labels")
    root = place.path / ("cars_train" if train else "cars_test")
    paths = [records.inside(root, str(np.ravel(row["fname"])[0]), str(file)) for row in rows]
    labels = [_index(np.ravel(row["class"])[0], names, str(file)) for row in rows]
    return _labelled(place, paths, labels, names, names, prompts.CARS)


def _labelled(
    place: Place,
    paths: Sequence[Path],
    labels: Sequence[int],
    keys: Sequence[str],
    names: Sequence[str] | None,
    templates: Mapping[str, Sequence[str]],
) -> Labelled:
    if not paths:
        raise UserError(f"{place.path}: the {place.split} split is empty: use another --split")
    classes = records.named(place, keys, names)
    return Labelled(Files(paths), [frozenset([x]) for x in labels], classes, templates)


def _table(path: Path) -> dict[str, str]:
    """Lines of a number and a text."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return dict(line.split(maxsplit=1) for line in lines if line.strip())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}: name the folder of the release") from error


def _index(number: Any, keys: Sequence[str], where: str) -> int:
    """A class number from 1 as an index."""
    try:
        index = int(number) - 1
    except (TypeError, ValueError):
        index = -1
    if not 0 <= index < len(keys):
        raise UserError(f"{where}: class {number!r} of {len(keys)}: copy the release again")
    return index


def _matlab(path: Path, *names: str) -> Mapping[str, Any]:
    """Variables of a MATLAB file."""
    import scipy.io

    try:
        found = scipy.io.loadmat(str(path), variable_names=names)
    except Exception as error:  # a damaged file fails in many ways inside scipy
        raise UserError(f"{path}: unreadable ({error}): copy the release again") from error
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(f"{path}: has no {missing[0]}: take the file of the release")
    return found
