# SPDX-License-Identifier: Apache-2.0
"""Emoji as a re-identification set: an identity is a concept, a camera is a drawing style.

Identities of the test are never trained on, nor is a sibling of theirs that differs in gender or
number alone. They are looked for among the styles of training (``known``), or among the two styles
that training has not seen either (``new``). Split and order follow from fixed hashes of names.
"""

from __future__ import annotations

import collections
import hashlib
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from m2jax.config import UserError
from m2jax.data.emoji.batches import shrink
from m2jax.data.emoji.dataset import Drawings, EmojiData
from m2jax.data.emoji.packages import STYLES
from m2jax.data.emoji.split import fraction

TEST_SHARE = 0.3  # of the bases that training styles draw; what those never draw is test too
PARTS = ("train", "known", "new")
CAMERAS = tuple(style.name for style in STYLES)  # a camera is an index into this


class Seen(NamedTuple):
    """Drawings of a part, each identity in two styles or more."""

    images: UInt8[np.ndarray, "n size size 3"]  # on white
    identities: Int[np.ndarray, " n"]  # concept ids
    cameras: Int[np.ndarray, " n"]  # rows of ``CAMERAS``


def identities(data: EmojiData, part: str, *, size: int = 64) -> Seen:
    """The drawings of one part, by concept and style.

    Left out are drawings that a style has under several names (no model can tell those apart) and
    concepts of which one style alone is left.

    Args:
        data: the emoji set.
        part: ``train``; ``known``: test identities in the styles of training; ``new``: test
            identities in the styles of neither.
        size: pixels of a side; divides 64.

    Raises:
        UserError: an unknown part or a size that does not divide.
    """
    if part not in PARTS:
        raise UserError(f"emoji identities: part {part!r}: use one of {', '.join(PARTS)}")
    drawings = _new_styles(data) if part == "new" else data.training_styles()
    test = np.array([_is_test(data, int(concept)) for concept in drawings.concept])
    drawings = drawings.where(test if part != "train" else ~test)
    drawings = drawings.where(_told_apart(drawings))
    styles = collections.Counter(drawings.concept.tolist())
    drawings = drawings.where(np.array([styles[int(c)] > 1 for c in drawings.concept], np.bool_))
    cameras = np.array([CAMERAS.index(style) for style in drawings.style], np.int64)
    order = np.lexsort((cameras, drawings.concept))
    drawings = drawings.where(order)
    return Seen(
        _on_white(shrink(drawings.images, size)),
        drawings.concept.astype(np.int64),
        cameras[order],
    )


def _is_test(data: EmojiData, concept: int) -> bool:
    of = data.concepts[concept]
    return not of.seen or fraction(f"identity {of.base}") < TEST_SHARE


def _new_styles(data: EmojiData) -> Drawings:
    parts = [data.drawings(style.name) for style in STYLES if style.split == style.name]
    return Drawings(
        np.concatenate([part.images for part in parts]),
        np.concatenate([part.concept for part in parts]),
        tuple(style for part in parts for style in part.style),
    )


def _told_apart(drawings: Drawings) -> np.ndarray:
    """Which drawings are the only ones of their style with their pixels."""
    keys = [
        (style, hashlib.sha256(image.tobytes()).digest())
        for style, image in zip(drawings.style, drawings.images, strict=True)
    ]
    count = collections.Counter(keys)
    return np.array([count[key] == 1 for key in keys], np.bool_)


def _on_white(images: UInt8[np.ndarray, "n h w 4"]) -> UInt8[np.ndarray, "n h w 3"]:
    colour, alpha = images[..., :3].astype(np.uint16), images[..., 3:].astype(np.uint16)
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
