# SPDX-License-Identifier: Apache-2.0
"""Edited copies with their truth: what a query took from a reference, and what was done to it.

A query is a piece of its host, then edited pieces of references, each between pieces of the host,
so that a copy has surroundings that are none. The kinds of edits are those that VCSL names; their
strengths and the layout are our own choices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFilter

from m2jax.config import UserError

Frames = UInt8[np.ndarray, "frames height width 3"]
Edit = Callable[[Image.Image, np.random.Generator], Image.Image]

SHORTEST = 8  # frames of a copied piece, at least


class Segment(NamedTuple):
    """Frames of the query that come from frames of a reference; ends are exclusive."""

    reference: str
    query_start: int
    reference_start: int
    query_end: int
    reference_end: int
    kinds: tuple[str, ...]  # of edits


@dataclass(frozen=True)
class Query:
    """An edited video and its truth."""

    frames: Frames
    segments: tuple[Segment, ...]
    reencode: int  # constant rate factor that it is to be encoded with; 0: as it is


def crop(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Keeps 60 to 85 % of each side."""
    share = rng.uniform(0.6, 0.85)
    width, height = (max(1, round(share * side)) for side in image.size)
    left, top = (
        int(rng.integers(0, whole - part + 1))
        for whole, part in zip(image.size, (width, height), strict=True)
    )
    return image.resize(image.size, box=(left, top, left + width, top + height))


def flip(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Left and right exchanged."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def letterbox(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Black bars above and below, or at the sides, of 15 to 30 % together."""
    share, across = rng.uniform(0.7, 0.85), rng.random() < 0.5
    width, height = image.size
    size = (round(width * share), height) if across else (width, round(height * share))
    out = Image.new("RGB", image.size)
    out.paste(image.resize(size), ((width - size[0]) // 2, (height - size[1]) // 2))
    return out


def logo(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A filled ring in a corner."""
    out = image.copy()
    side = max(4, round(min(image.size) * rng.uniform(0.15, 0.3)))
    x = int(rng.choice([2, image.width - side - 2]))
    y = int(rng.choice([2, image.height - side - 2]))
    colour, inner = (tuple(int(c) for c in rng.integers(0, 256, 3)) for _ in range(2))
    ImageDraw.Draw(out).ellipse((x, y, x + side, y + side), inner, colour, max(1, side // 5))
    return out


def text(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Words in two lines across the lower half."""
    out = image.copy()
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz      "))
    size = image.height * rng.uniform(0.09, 0.16)
    for line in (0.6, 0.8):
        words = "".join(rng.choice(letters, 24))
        place = (0.05 * image.width, line * image.height)
        ImageDraw.Draw(out).text(
            place, words, "white", font_size=size, stroke_width=1, stroke_fill="black"
        )
    return out


def colour(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Each channel stretched and moved; one in three turns grey."""
    values = np.asarray(image, np.float32) * rng.uniform(0.7, 1.3, 3) + rng.uniform(-30, 30, 3)
    out = Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))
    return out.convert("L").convert("RGB") if rng.random() < 1 / 3 else out


def blur(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """As after scaling down and up."""
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.01, 0.02) * image.width))


def picture_in_picture(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Shrunk to 50 to 70 % of a side, on a plain ground; where, stays for the segment."""
    share = rng.uniform(0.5, 0.7)
    size = max(1, round(share * image.width)), max(1, round(share * image.height))
    out = Image.new("RGB", image.size, tuple(int(c) for c in rng.integers(0, 256, 3)))
    place = [int(rng.integers(0, w - s + 1)) for w, s in zip(image.size, size, strict=True)]
    out.paste(image.resize(size), (place[0], place[1]))
    return out


# On each frame alone; the same draw for all frames of a segment.
PICTURES: Mapping[str, Edit] = MappingProxyType(
    {
        "crop": crop,
        "flip": flip,
        "letterbox": letterbox,
        "logo": logo,
        "text": text,
        "colour": colour,
        "blur": blur,
        "picture-in-picture": picture_in_picture,
    }
)
# On time, or on the file.
TIMES = ("speed", "insertion", "reordering", "re-encode")
KINDS = (*PICTURES, *TIMES)


def simulate(
    host: Frames,
    references: Mapping[str, Frames],
    kinds: Sequence[str],
    rng: np.random.Generator,
    *,
    shortest: int = SHORTEST,
) -> Query:
    """A query with one copied piece of each reference.

    Args:
        host: what the copies lie in.
        references: by name; frames of one size, as the host's.
        kinds: of edits, all applied to each piece.
        rng: decides everything.
        shortest: frames of a piece, at least.

    Raises:
        UserError: an unknown kind, or a video too short to be cut.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise UserError(f"edit {unknown[0]}: unknown: use some of {', '.join(KINDS)}")
    short = [n for n, own in {"host": host, **references}.items() if len(own) < 2 * shortest]
    if short:
        raise UserError(f"{short[0]}: too short to cut: give at least {2 * shortest} frames")
    pieces: list[Frames] = []
    segments: list[Segment] = []
    position = 0

    def add(frames: Frames) -> None:
        nonlocal position
        pieces.append(frames)
        position += len(frames)

    cuts = np.linspace(0, len(host), len(references) + 2).astype(int)
    add(host[: cuts[1]])
    for number, (name, own) in enumerate(references.items()):
        for start, end in _pieces(len(own), kinds, rng, shortest):
            taken = _in_time(np.arange(start, end), kinds, rng)
            first = position
            for run in _runs(taken, host, kinds, rng):
                if isinstance(run, np.ndarray) and run.ndim == 4:
                    add(run)  # inserted frames end a segment
                    first = position
                    continue
                add(_edited(own[run], kinds, rng))
                span = int(run[0]), int(run[-1]) + 1
                segments.append(Segment(name, first, span[0], position, span[1], tuple(kinds)))
                first = position
        add(host[cuts[number + 1] : cuts[number + 2]])
    factor = int(rng.integers(30, 40)) if "re-encode" in kinds else 0
    return Query(np.concatenate(pieces), tuple(segments), factor)


def _pieces(
    length: int, kinds: Sequence[str], rng: np.random.Generator, shortest: int
) -> list[tuple[int, int]]:
    """What is taken of a reference: one piece, or two in the other order."""
    size = int(rng.integers(shortest, max(shortest + 1, min(length // 2, 4 * shortest) + 1)))
    if "reordering" not in kinds:
        start = int(rng.integers(0, length - size + 1))
        return [(start, start + size)]
    size = min(size, length // 2)
    early = int(rng.integers(0, length - 2 * size + 1))
    late = int(rng.integers(early + size, length - size + 1))
    return [(late, late + size), (early, early + size)]


def _in_time(taken: np.ndarray, kinds: Sequence[str], rng: np.random.Generator) -> np.ndarray:
    """Frames of the reference in the query's time."""
    if "speed" not in kinds:
        return taken
    factor = float(rng.choice([0.5, 0.75, 1.5, 2.0]))
    count = max(2, round(len(taken) / factor))
    return taken[np.minimum((np.arange(count) * factor).astype(int), len(taken) - 1)]


def _runs(
    taken: np.ndarray, host: Frames, kinds: Sequence[str], rng: np.random.Generator
) -> list[np.ndarray]:
    """The piece whole, or in two with frames of the host between them."""
    if "insertion" not in kinds or len(taken) < 8:
        return [taken]
    middle = int(rng.integers(len(taken) // 3, 2 * len(taken) // 3 + 1))
    size = int(rng.integers(3, 7))
    start = int(rng.integers(0, max(1, len(host) - size)))
    return [taken[:middle], host[start : start + size], taken[middle:]]


def _edited(frames: Frames, kinds: Sequence[str], rng: np.random.Generator) -> Frames:
    """Each frame edited alike."""
    seeds = {kind: int(rng.integers(2**31)) for kind in kinds if kind in PICTURES}
    out = np.empty_like(frames)
    for row, values in enumerate(frames):
        image = Image.fromarray(values)
        for kind, seed in seeds.items():
            image = PICTURES[kind](image, np.random.default_rng(seed))
        out[row] = np.asarray(image)
    return out


def labels(query: str, made: Query, names: Sequence[str]) -> dict[str, list[list[int]]]:
    """The truth in VCSL's form: of each reference its segments, ``[]`` where nothing was taken.

    Args:
        query: name of the query.
        made: the query.
        names: of the references that it is paired with.
    """
    found: dict[str, list[list[int]]] = {f"{query}-{name}": [] for name in names}
    for segment in made.segments:
        if f"{query}-{segment.reference}" in found:
            found[f"{query}-{segment.reference}"].append(list(map(int, segment[1:5])))
    return found
