# SPDX-License-Identifier: Apache-2.0
"""Images listed in a tab-separated file: a column of paths, and one of texts per language."""

from __future__ import annotations

import csv
from pathlib import Path

from m2jax.config import UserError
from m2jax.data.image import open_image
from m2jax.data.pairs import Pair

PATH = "path"


class TsvPairs:
    """One TSV file, UTF-8, with a first line such as ``path<TAB>en<TAB>zh``.

    Paths are relative to the folder of the file. A text may be empty: the row then has none in that
    language. Quotes mean nothing.

    Args:
        file: the TSV file.
        check: look now whether every image is there, not when its row comes up.
        at_least: as for ``open_image``.

    Raises:
        UserError: it cannot be read, a line has another number of fields, or an image is missing.
    """

    def __init__(self, file: Path, *, check: bool = True, at_least: int = 0) -> None:
        self._file, self._at_least = file, at_least
        try:
            with file.open(encoding="utf-8-sig", newline="") as handle:
                lines = list(csv.reader(handle, delimiter="\t", quoting=csv.QUOTE_NONE))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{file}: no TSV file in UTF-8 ({error}): mend data.files") from error
        header = lines[0] if lines else []
        if PATH not in header or len(header) < 2 or len(set(header)) != len(header):
            raise UserError(
                f"{file}:1: columns {header!r:.80}: the first line must name path and a column per "
                "language, as in path<TAB>en<TAB>zh"
            )
        self._languages = [name for name in header if name != PATH]
        column = header.index(PATH)
        self._rows: list[tuple[int, str, tuple[str, ...]]] = []  # line, path, texts
        for number, line in enumerate(lines[1:], 2):
            if len(line) != len(header):
                raise UserError(
                    f"{file}:{number}: {len(line)} fields where the first line has {len(header)}: "
                    "mend the line"
                )
            path = line.pop(column)
            self._rows.append((number, path, tuple(text.strip() for text in line)))
        if check:
            self._check_images()

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, row: int) -> Pair:
        """One row; see ``Pairs``."""
        number, path, texts = self._rows[row]
        try:
            image = open_image(self._file.parent / path, at_least=self._at_least)
        except UserError as error:
            raise UserError(f"{self._file}:{number}: {error}") from error
        named = zip(self._languages, texts, strict=True)
        return Pair(image, {language: text for language, text in named if text})

    def _check_images(self) -> None:
        """A wrong path is better found now than after a day of training."""
        missing = [(n, p) for n, p, _ in self._rows if not (self._file.parent / p).is_file()]
        if missing:
            number, path = missing[0]
            raise UserError(
                f"{self._file}:{number}: no image {path!r} in {self._file.parent} ({len(missing)} "
                f"of {len(self._rows)} rows): mend the paths, or set data.unreadable=skip"
            )
