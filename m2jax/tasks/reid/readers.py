# SPDX-License-Identifier: Apache-2.0
"""Identities, cameras and splits of re-identification sets, from their published layouts.

Market-1501 (Zheng et al. 2015): ``bounding_box_train``, ``query``, ``bounding_box_test``; names
0002_c1s1_000451_03.jpg (identity, camera, sequence), -1 for junk, which is left out, 0000 for
distractors, which stay in the gallery. CUHK03 (Li et al. 2014) in the new protocol (Zhong et al.
2017) has the same three folders and names 0001_c1_1.png. MSMT17 (Wei et al. 2018), version 1:
``train``, ``test`` and ``list_train.txt``, ``list_val.txt``, ``list_query.txt``,
``list_gallery.txt`` of lines "0000/0000_000_01_0303morning_0015_0.jpg 0", camera in the third part;
train and val are trained on together, as DC-Former does.

The emoji set (``data.emoji.identities``) stands beside them: its test identities are looked for in
the styles of training, or in two new ones; every drawing is query and gallery.

Cameras are numbered from 0. Identities of the training split are numbered from 0 without gaps;
those of query and gallery keep their numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from m2jax.config import UserError
from m2jax.data import emoji
from m2jax.data.emoji.identities import Seen, identities
from m2jax.eval.sets.records import Files, Images, Made
from m2jax.tasks.reid.metrics import Labels

BOXES = ("bounding_box_train", "query", "bounding_box_test")
BOX_NAME = re.compile(r"(-1|\d{1,6})_c(\d{1,3})(?:s\d+)?_.*\.(?:jpg|jpeg|png)", re.IGNORECASE)
MSMT_LINE = re.compile(r"(\S+)\s+(\d+)")
MSMT_CAMERA = re.compile(r"[^_]+_[^_]+_(\d{1,3})_")
JUNK = -1


class Split(NamedTuple):
    """Images of one split."""

    images: Images
    labels: Labels

    @property
    def files(self) -> list[Path]:
        """Of a set that lies in files."""
        return list(self.images.paths) if isinstance(self.images, Files) else []


class ReidSet(NamedTuple):
    """A data set."""

    train: Split
    query: Split
    gallery: Split

    @property
    def identities(self) -> int:
        """Of the training split."""
        return int(self.train.labels.identities.max()) + 1

    @property
    def cameras(self) -> int:
        """Of all splits together."""
        return max(int(split.labels.cameras.max()) for split in self) + 1


class _Image(NamedTuple):
    file: Path
    identity: int
    camera: int  # from 0


def market1501(root: Path) -> ReidSet:
    """Market-1501. See the module's words for the layout.

    Raises:
        UserError: a folder is missing or empty, or a name tells no identity.
    """
    return _of_boxes(root, "Market-1501")


def cuhk03(root: Path) -> ReidSet:
    """CUHK03 in the new protocol: its folder ``labeled`` or ``detected``.

    Raises:
        UserError: as ``market1501``.
    """
    return _of_boxes(root, "CUHK03")


def msmt17(root: Path) -> ReidSet:
    """MSMT17, version 1.

    Raises:
        UserError: a list is missing or has a line that tells nothing, or names a missing file.
    """
    lists = {
        "train": [("list_train.txt", "train"), ("list_val.txt", "train")],
        "query": [("list_query.txt", "test")],
        "gallery": [("list_gallery.txt", "test")],
    }
    parts = [
        [image for name, folder in named for image in _msmt_list(root, name, folder)]
        for named in lists.values()
    ]
    return _assembled(parts, root)


def _of_boxes(root: Path, what: str) -> ReidSet:
    return _assembled([_boxes(root / name, what) for name in BOXES], root)


def _boxes(folder: Path, what: str) -> list[_Image]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder: name the unpacked {what}")
    found = []
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() not in (".jpg", ".jpeg", ".png"):
            continue  # Thumbs.db and its like come with the archives
        match = BOX_NAME.fullmatch(file.name)
        if not match or int(match[2]) < 1:
            raise UserError(f"{file}: no name of {what} (0002_c1s1_000451_03.jpg): move it away")
        if int(match[1]) != JUNK:
            found.append(_Image(file, int(match[1]), int(match[2]) - 1))
    return found


def _msmt_list(root: Path, name: str, folder: str) -> list[_Image]:
    try:
        lines = (root / name).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{root / name}: unreadable ({error}): name the unpacked MSMT17") from error
    found, inside = [], (root / folder).resolve()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        match = MSMT_LINE.fullmatch(line.strip())
        camera = match and MSMT_CAMERA.match(Path(match[1]).name)
        if not match or not camera or int(camera[1]) < 1:
            raise UserError(
                f"{root / name}: line {number} is no path with a camera and an identity: mend it"
            )
        file = root / folder / match[1]
        if not file.resolve().is_relative_to(inside):
            raise UserError(f"{root / name}: line {number} leaves {folder}/: mend it")
        if not file.is_file():
            raise UserError(f"{file}: is missing, though {name} names it: unpack it again")
        found.append(_Image(file, int(match[2]), int(camera[1]) - 1))
    return found


def _assembled(parts: Sequence[list[_Image]], root: Path) -> ReidSet:
    for name, images in zip(ReidSet._fields, parts, strict=True):
        if not images:
            raise UserError(f"{root}: its {name} split has no image: unpack it again")
    train = parts[0]
    names = {old: new for new, old in enumerate(sorted({image.identity for image in train}))}
    return ReidSet(
        _split(train, lambda identity: names[identity]),
        *(_split(images, lambda identity: identity) for images in parts[1:]),
    )


def _split(images: Sequence[_Image], number: Callable[[int], int]) -> Split:
    identities = np.array([number(image.identity) for image in images], np.int64)
    cameras = np.array([image.camera for image in images], np.int64)
    return Split(Files([image.file for image in images]), Labels(identities, cameras))


def emoji_set(part: str, *, size: int = 64) -> ReidSet:
    """Concepts as identities and drawing styles as cameras; test in ``known`` or ``new`` styles.

    Raises:
        UserError: an unknown part or a size that does not divide 64.
    """
    data = emoji.load()
    train, test = (identities(data, name, size=size) for name in ("train", part))
    names = {old: new for new, old in enumerate(np.unique(train.identities).tolist())}
    numbers = np.array([names[int(each)] for each in train.identities], np.int64)
    side = _drawn(test)
    return ReidSet(_drawn(train._replace(identities=numbers)), side, side)


def _drawn(seen: Seen) -> Split:
    images = Made(len(seen.images), lambda row: Image.fromarray(seen.images[row]))
    return Split(images, Labels(seen.identities, seen.cameras))


READERS = {"market1501": market1501, "cuhk03": cuhk03, "msmt17": msmt17}
EMOJI = {"emoji": "known", "emoji-new-styles": "new"}  # need no folder
LAYOUTS = (*READERS, *EMOJI)


def read(layout: str, root: Path | None) -> ReidSet:
    """A data set by the name of its layout.

    Raises:
        UserError: an unknown layout, no folder where it needs one; as the readers.
    """
    if layout in EMOJI:
        return emoji_set(EMOJI[layout])
    if layout not in READERS:
        raise UserError(f"--layout {layout}: use one of {', '.join(LAYOUTS)}")
    if root is None:
        raise UserError(f"--layout {layout}: name the unpacked set with --data DIR")
    return READERS[layout](root)
