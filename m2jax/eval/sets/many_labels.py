# SPDX-License-Identifier: Apache-2.0
"""The multi-label benchmarks PASCAL VOC 2007 and NUS-WIDE in the layouts of their releases.

COCO's is ``annotated.coco_objects``. Chinese names of classes are our translation.
"""

from __future__ import annotations

from pathlib import Path

from m2jax.config import UserError
from m2jax.eval import prompts
from m2jax.eval.sets import records
from m2jax.eval.sets.records import Files, Labelled, Place

LIST_BYTES = 2**28
VOC = {
    **{"aeroplane": "飞机", "bicycle": "自行车", "bird": "鸟", "boat": "船", "bottle": "瓶子"},
    **{"bus": "公共汽车", "car": "汽车", "cat": "猫", "chair": "椅子", "cow": "牛"},
    **{"diningtable": "餐桌", "dog": "狗", "horse": "马", "motorbike": "摩托车", "person": "人"},
    **{"pottedplant": "盆栽", "sheep": "羊", "sofa": "沙发", "train": "火车", "tvmonitor": "电视"},
}
_SPACED = {
    **{"diningtable": "dining table", "pottedplant": "potted plant", "tvmonitor": "tv monitor"},
}


def voc(place: Place) -> Labelled:
    """The folder with ``ImageSets/Main`` and ``JPEGImages``, ``VOCdevkit/VOC2007`` or above it.

    A class list says 1 shown, -1 not, 0 shown but difficult; 0 counts as shown here, as it does in
    the multi-label papers' code (from memory: ML-GCN's), unlike in VOC's own evaluation.

    Raises:
        UserError: a list is missing or damaged.
    """
    root = _first(place.path, ("", "VOC2007", "VOCdevkit/VOC2007"), "ImageSets/Main")
    main = root / "ImageSets" / "Main"
    names = [line.split()[0] for line in _lines(main / f"{place.split}.txt")]
    shown: list[set[int]] = [set() for _ in names]
    for number, kind in enumerate(VOC):
        file = main / f"{kind}_{place.split}.txt"
        rows = [line.split() for line in _lines(file)]
        wrong = [r for r in rows if len(r) != 2 or r[1] not in ("1", "-1", "0")]
        if wrong or [row[0] for row in rows] != names:
            raise UserError(f"{file}: does not go with {place.split}.txt: copy the release again")
        for row, (_, mark) in enumerate(rows):
            if mark != "-1":
                shown[row].add(number)
    where = str(main / f"{place.split}.txt")
    images = place.images or root / "JPEGImages"
    files = [records.inside(images, f"{name}.jpg", where) for name in names]
    classes = {"en": [(_SPACED.get(k, k),) for k in VOC], "zh": [(zh,) for zh in VOC.values()]}
    labels = [frozenset(each) for each in shown]
    return Labelled(Files(files), labels, classes, prompts.TEMPLATES, True)


def nus_wide(place: Place) -> Labelled:
    """The folder with ``ImageList`` and ``Groundtruth``; images lie in ``Flickr`` or ``--images``.

    All images of the split are there, those without a label too: 107,859 of the test.

    Raises:
        UserError: a list is missing or damaged.
    """
    part = {"test": "Test", "train": "Train"}.get(place.split)
    if part is None:
        raise UserError(f"--split {place.split}: NUS-WIDE has train and test: use one of them")
    root = place.path
    listed = root / "ImageList" / f"{part}Imagelist.txt"
    names = [line.strip().replace("\\", "/") for line in _lines(listed)]
    concepts = _concepts(root)
    shown: list[set[int]] = [set() for _ in names]
    for number, concept in enumerate(concepts):
        file = records.inside(
            root / "Groundtruth" / "TrainTestLabels", f"Labels_{concept}_{part}.txt", str(root)
        )
        marks = [line.strip() for line in _lines(file)]
        if len(marks) != len(names) or not set(marks) <= {"0", "1"}:
            raise UserError(f"{file}: does not go with {listed.name}: copy the release again")
        for row, mark in enumerate(marks):
            if mark == "1":
                shown[row].add(number)
    images = place.images or root / "Flickr"
    files = [records.inside(images, name, str(listed)) for name in names]
    english = [concept.replace("_", " ") for concept in concepts]
    classes = records.named(place, concepts, english)
    labels = [frozenset(each) for each in shown]
    return Labelled(Files(files), labels, classes, prompts.TEMPLATES, True)


def _concepts(root: Path) -> list[str]:
    """The 81 concepts; the list lies in one of two places."""
    folder = _first(root, ("", "ConceptsList"), "Concepts81.txt")
    found = [line.strip() for line in _lines(folder / "Concepts81.txt")]
    if not found or len(set(found)) != len(found):
        raise UserError(f"{folder / 'Concepts81.txt'}: damaged: copy the release again")
    return found


def _first(root: Path, folders: tuple[str, ...], inside: str) -> Path:
    for folder in folders:
        if (root / folder / inside).exists():
            return root / folder
    raise UserError(f"{root}: holds no {inside}: name the folder of the release")


def _lines(file: Path) -> list[str]:
    """Lines that are not empty."""
    try:
        if file.stat().st_size > LIST_BYTES:
            raise UserError(f"{file}: over {LIST_BYTES:,} bytes: name the right folder")
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}: name the folder of the release") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8: copy the release again") from error
    return [line for line in lines if line.strip()]
