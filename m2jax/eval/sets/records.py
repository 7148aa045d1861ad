# SPDX-License-Identifier: Apache-2.0
"""What a reader gives and a protocol takes: pictures, and what is asked about them.

Three kinds of data set cover the suites: pictures with labels, pictures with captions, and pictures
with questions that have candidate answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from PIL import Image

from m2jax.config import UserError
from m2jax.data.image import open_image


@runtime_checkable
class Images(Protocol):
    """Pictures, read by number; from several threads at once."""

    def __len__(self) -> int: ...

    def read(self, row: int) -> Image.Image:
        """One picture, decoded.

        Raises:
            UserError: it cannot be read; the message names it.
        """
        ...


@dataclass(frozen=True)
class Files:
    """Image files."""

    paths: Sequence[Path]

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, row: int) -> Image.Image:
        """See ``Images``."""
        return open_image(self.paths[row])


@dataclass(frozen=True)
class Made:
    """Pictures that a function makes, such as rows of an array."""

    count: int
    make: Callable[[int], Image.Image]

    def __len__(self) -> int:
        return self.count

    def read(self, row: int) -> Image.Image:
        """See ``Images``."""
        return self.make(row)


@dataclass(frozen=True)
class Some:
    """Some of other pictures."""

    images: Images
    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, row: int) -> Image.Image:
        """See ``Images``."""
        return self.images.read(int(self.rows[row]))


Classes = Sequence[Sequence[str]]  # of each class its names: one, or several that mean the same


@dataclass(frozen=True)
class Labelled:
    """Pictures with labels; one each, unless ``multi_label``."""

    images: Images
    labels: Sequence[frozenset[int]]  # of each picture: classes that it shows
    classes: Mapping[str, Classes]  # by language
    templates: Mapping[str, Sequence[str]]  # prompts by language, with {c} for the name; may lack
    multi_label: bool = False


@dataclass(frozen=True)
class Captioned:
    """Pictures with captions."""

    images: Images
    captions: Mapping[str, Sequence[Sequence[str]]]  # by language, of each picture


class Question(NamedTuple):
    """Which of these texts is true of a picture?"""

    image: int
    texts: Sequence[str]
    credit: Sequence[float]  # in [0, 1], of each text: what choosing it earns


@dataclass(frozen=True)
class Asked:
    """Pictures with questions; several may be about one picture."""

    images: Images
    questions: Mapping[str, Sequence[Question]]  # by language


DataSet = Labelled | Captioned | Asked


# By language the names of classes: in the order of the classes, or by what the data set calls each
# (a folder, a label).
ClassNames = Mapping[str, Classes | Mapping[str, Sequence[str]]]


class Place(NamedTuple):
    """Where a data set lies, and what a user says about it."""

    path: Path
    split: str = "test"
    language: str = ""  # of files that do not say theirs; empty: look at the texts
    images: Path | None = None  # the folder that relative paths of images start from
    names: ClassNames | None = None  # of classes, where the data set has none or others
    asked: bool = False  # whether the split was asked for: a data set without it is then refused


def inside(root: Path, name: object, where: str) -> Path:
    """The file that a data set calls ``name``, below its folder and nowhere else.

    Raises:
        UserError: it is no text, is absolute, or climbs out of the folder.
    """
    if not isinstance(name, str) or not name or "\x00" in name:
        raise UserError(f"{where}: {name!r:.60} is no path of an image: mend the line")
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise UserError(
            f"{where}: {name!r} leads out of {root}: use paths below that folder, or --images DIR"
        )
    return root / path


def is_chinese(text: str) -> bool:
    """Whether most letters are Chinese characters (the basic block of Unicode)."""
    letters = [c for c in text if c.isalpha()]
    return 2 * sum("一" <= c <= "鿿" for c in letters) > len(letters)


def language_of(texts: Sequence[str]) -> str:
    """Of most of the texts: zh or en."""
    return "zh" if 2 * sum(map(is_chinese, texts)) > len(texts) else "en"


def named(
    place: Place, keys: Sequence[str], own: Sequence[str] | None = None
) -> Mapping[str, Classes]:
    """Names of classes by language: the data set's own, and the user's in place of or beside them.

    Args:
        place: may have names.
        keys: what the data set calls its classes, in their order.
        own: its names of them where they are for people.

    Raises:
        UserError: the user's names leave classes out, or are of more.
    """
    found: dict[str, Classes] = {}
    if own is not None or place.names is None:
        found[language_of(own or keys)] = [(name,) for name in own or keys]
    for language, names in (place.names or {}).items():
        if isinstance(names, Mapping):
            missing = [key for key in keys if key not in names]
            if missing:
                raise UserError(f"--classes: {language} has no name for {missing[0]!r}: add it")
            found[language] = [tuple(names[key]) for key in keys]
        elif len(names) != len(keys):
            raise UserError(
                f"--classes: {len(names)} names in {language} for {len(keys)} classes of "
                f"{place.path}: write one per class"
            )
        else:
            found[language] = [tuple(each) for each in names]
    return found
