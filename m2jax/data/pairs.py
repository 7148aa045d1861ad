# SPDX-License-Identifier: Apache-2.0
"""Training batches of one's own image-text pairs: TSV files with images, tars, or a mixture.

Images are decoded and resized as the model's preprocessing does it, so that training sees what
inference will see. Files are hostile until they are decoded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from m2jax.config import Caption, Data, UserError
from m2jax.data import m2_transform
from m2jax.data.image import Preprocess
from m2jax.data.order import Order
from m2jax.data.text import Tokenizer, tokenizer_from_dict

ANY = "any"  # the language that stands for whichever a row has
LANGUAGES = ("en", "zh")  # that it may have
TRIES = 100  # unreadable rows in a row after which a source counts as broken


class Pair(NamedTuple):
    """One picture and what is said of it."""

    image: Image.Image
    texts: Mapping[str, str | tuple[str, ...]]  # by language, one or several; no empty ones


@runtime_checkable
class Pairs(Protocol):
    """A source of pairs, read by number."""

    def __len__(self) -> int: ...

    def read(self, row: int) -> Pair:
        """One pair.

        Raises:
            UserError: the row cannot be read; the message names it.
        """
        ...


def caption_languages(data: Data, caption: Caption) -> tuple[str, ...]:
    """The languages a caption head writes, in the order of their tags."""
    if caption.languages:
        return caption.languages
    return LANGUAGES if ANY in data.languages else data.languages


class Chosen(NamedTuple):
    """A row that could be read."""

    row: int
    image: Image.Image  # RGBA square: as a batch holds it
    texts: tuple[str, ...]  # one per language of the run
    tags: tuple[int, ...]  # of the texts' languages, where they are asked for
    skipped: int  # unreadable rows before it


class PairBatches:
    """Batch ``index`` of a run over files, from the seed and the index alone.

    Args:
        sources: by the name the log calls them.
        weights: of each.
        cfg: batch size, views, languages, what to do about unreadable rows.
        tokenizer: of the model.
        preprocess: of the model.
        seed: of the run.
        tags: languages whose number a batch tells of each text; none: it does not.

    Raises:
        UserError: no sources, an empty one, or weights that cannot be.
    """

    by_place = True

    def __init__(
        self,
        sources: Mapping[str, Pairs],
        weights: Sequence[float],
        cfg: Data,
        *,
        tokenizer: Tokenizer,
        preprocess: Preprocess,
        seed: int,
        tags: tuple[str, ...] = (),
    ) -> None:
        self._tags = tags
        self.parts = tuple(sources)  # what the numbers in a batch's "part" stand for
        self._sources = list(sources.values())
        self._cfg, self._seed = cfg, seed
        self._tokenizer, self._preprocess = tokenizer, preprocess
        self._first = np.cumsum([0, *(len(source) for source in self._sources)])
        for name, source in sources.items():
            if not len(source):
                raise UserError(f"data: source {name!r} has no rows: name other files")
        if cfg.transform not in m2_transform.TRANSFORMS:
            known = ", ".join(m2_transform.TRANSFORMS)
            raise UserError(f"data.transform={cfg.transform!r}: no such transform: one of {known}")
        self._order = Order([len(s) for s in self._sources], weights, seed)
        self.assets: dict[str, Any] = {
            "tokenizer": tokenizer.to_dict(),
            "preprocess": preprocess.to_dict(),
        }

    def batch(self, index: int, rows: slice) -> dict[str, np.ndarray]:
        """Rows of batch ``index``.

        Returns:
            image uint8 [n, views, size, size, 4] (the views are alike: augmentation tells them
            apart), text int32 and text_mask bool [n, languages, length], concept int32 [n] (the
            row's number over all sources); language int32 [n, languages] where there are tags (the
            number of each text's); for the log alone, part int32 [n] (index into
            ``parts``) and skipped int32 [n] (unreadable rows passed over).

        Raises:
            UserError: a row cannot be read and ``data.unreadable`` is "error".
        """
        size = self._cfg.batch_size
        begin, end, _ = rows.indices(size)
        places = np.arange(index * size + begin, index * size + end)
        found = self._order.at(places)
        chosen = [
            self._read(int(part), int(row), int(place))
            for place, part, row in zip(places, found.part, found.row, strict=True)
        ]
        n, side, languages = len(chosen), self._preprocess.size, len(self._cfg.languages)
        image = np.empty((n, self._cfg.views, side, side, 4), np.uint8)
        for row, one in enumerate(chosen):
            image[row] = np.asarray(one.image)
        told = {}
        if self._tags:
            told["language"] = np.array([one.tags for one in chosen], np.int32)
        tokens = self._tokenizer([text for one in chosen for text in one.texts])
        numbers = [self._first[p] + one.row for p, one in zip(found.part, chosen, strict=True)]
        return told | {
            "image": image,
            "text": tokens.ids.reshape(n, languages, -1),
            "text_mask": tokens.mask.reshape(n, languages, -1),
            # Tells rows of a batch apart, so it may wrap around in sets of billions.
            "concept": np.asarray(np.asarray(numbers, np.int64) % 2**31, np.int32),
            "part": found.part.astype(np.int32),
            "skipped": np.asarray([one.skipped for one in chosen], np.int32),
        }

    def __getstate__(self) -> dict[str, Any]:
        """What worker processes get; tokenizers of some libraries cannot be sent."""
        return {**self.__dict__, "_tokenizer": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _tokenizer=tokenizer_from_dict(state["assets"]["tokenizer"]))

    def _read(self, part: int, row: int, place: int) -> Chosen:
        """The row, or the next readable one of the same source where skipping is allowed."""
        source = self._sources[part]
        for skipped in range(TRIES):
            number = (row + skipped) % len(source)
            try:
                pair = source.read(number)
                texts, tags = self._texts(pair.texts, place, f"row {number} of {self.parts[part]}")
                square = self._square(pair.image, place).convert("RGBA")
                return Chosen(number, square, texts, tags, skipped)
            except UserError:
                if self._cfg.unreadable == "error":
                    raise
        raise UserError(
            f"data: {TRIES} rows of {self.parts[part]} in a row from {row} on cannot be read: "
            "look at that source; --config.data.unreadable=error shows the first reason"
        )

    def _square(self, image: Image.Image, place: int) -> Image.Image:
        """The image as the model takes it, changed first where ``data.transform`` asks for it."""
        if self._cfg.transform == "none":
            return self._preprocess.square(image)
        rng = np.random.default_rng((self._seed, 4, place))
        return m2_transform.train_square(image, self._preprocess, rng)

    def _texts(
        self, texts: Mapping[str, str | tuple[str, ...]], place: int, where: str
    ) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """One text per language of the run and its tag; of several in a language, one by lot."""
        chosen, tags = [], []
        for number, language in enumerate(self._cfg.languages):
            if language == ANY and texts:
                rng = np.random.default_rng((self._seed, 2, place, number))
                language = sorted(texts)[rng.integers(len(texts))]
            if language in texts:
                found = texts[language]
            else:
                raise UserError(
                    f"{where}: has no text in {language!r} (but in {sorted(texts)}): add it, or "
                    "set data.languages=('any',)"
                )
            if isinstance(found, tuple):
                rng = np.random.default_rng((self._seed, 3, place, number))
                found = found[rng.integers(len(found))]
            chosen.append(found)
            if self._tags:
                if language not in self._tags:
                    raise UserError(
                        f"{where}: has a text in {language!r}, which the caption head has no tag "
                        f"for: add it to loss.caption.languages={self._tags}, or leave the row out"
                    )
                tags.append(self._tags.index(language))
        return tuple(chosen), tuple(tags)
