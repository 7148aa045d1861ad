# SPDX-License-Identifier: Apache-2.0
"""A hundred bytes that stand for a record when it is compared with others."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, UInt8, UInt64
from PIL import Image
from scipy import fft

from m2jax.data.build.records import Caption, Record
from m2jax.data.build.steps import HAN

SIDE = 64  # pixels an image is scaled to before its transform
WAVES = 16  # per axis that go into the hash: 16 x 16 signs
IMAGE_BITS = WAVES * WAVES
STANDS_OUT = 0.2  # of the root mean square of the waves
_SHUFFLED = np.random.default_rng(256).permutation(IMAGE_BITS)
GRAMS = 3  # characters of a shingle
LETTERS_OF_HAN = 3  # that one Han character stands for
MINIMA = 64  # of a text's MinHash, one byte of each (b-bit MinHash, Li and Koenig 2010)


class Signatures(NamedTuple):
    """Of n records."""

    exact: UInt64[np.ndarray, " n"]  # of the image's bytes and all captions
    image: UInt8[np.ndarray, "n 32"]  # perceptual hash
    text: UInt8[np.ndarray, "n 64"]  # MinHash of the captions


def perceptual_hash(image: Image.Image) -> UInt8[np.ndarray, " 32"]:
    """Which low frequencies of a grey image stand out: 256 bits.

    The cosine transform (DCT-II) of the picture on white at 64 x 64 pixels; a bit is set where a
    frequency exceeds a fifth of their root mean square. pHash, whose idea this is, compares with
    their median; in symmetric drawings half of the frequencies vanish and so does their median, and
    those bits were noise: of drawings saved again as JPEG of quality 30, one in ten differed in 46
    bits of 256 and more, now in 9. The bits are shuffled, so that each stretch of them holds coarse
    and fine waves.
    """
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    grey = image.convert("RGB").convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
    transform = np.asarray(fft.dctn(np.asarray(grey, np.float64), norm="ortho"))
    waves = transform[:WAVES, :WAVES].ravel()
    waves[0] = 0.0  # the brightness
    threshold = STANDS_OUT * np.sqrt((waves**2).mean())
    # Rounding of a flat picture's transform is no wave: 1 is a grey level in 64 at one pixel.
    return np.packbits(waves[_SHUFFLED] > max(threshold, 1.0))


def minhash(captions: Sequence[Caption]) -> UInt8[np.ndarray, " 64"]:
    """MinHash of the captions' shingles of three characters, without case and punctuation.

    Zeros where there is no text; ``jaccard`` finds such a record like no other.
    """
    shingles: set[str] = set()
    for caption in captions:
        if text := plain(caption.text):
            shingles |= {text[i : i + GRAMS] for i in range(max(1, len(text) - GRAMS + 1))}
    if not shingles:
        return np.zeros(MINIMA, np.uint8)
    hashes = np.fromiter(map(_hash, sorted(shingles)), np.uint64, len(shingles))
    # Multiply-shift hashing: the upper bits of an odd multiple are as good as random.
    mixed = hashes[:, None] * _FACTORS + _OFFSETS
    return (mixed.min(axis=0) >> np.uint64(8)).astype(np.uint8)


def _factors() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0x6D326A61)
    pairs = rng.integers(0, 2**63, (2, MINIMA), np.uint64)
    return pairs[0] | np.uint64(1), pairs[1]


_FACTORS, _OFFSETS = _factors()


def plain(text: str) -> str:
    """What two captions must share to count as the same: letters and digits, lower case."""
    kept = (c if c.isalnum() else " " for c in text.casefold())
    return " ".join("".join(kept).split())


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def exact(record: Record) -> int:
    """A hash of the image's bytes and the captions, whose order means nothing."""
    digest = hashlib.blake2b(record.image, digest_size=8)
    for language, text in sorted((c.language, c.text) for c in record.captions):
        digest.update(f"\0{language}\0{text}".encode())
    return int.from_bytes(digest.digest(), "little")


def text_hashes(record: Record, at_least: int) -> list[int]:
    """Hashes of the plain captions that are long enough not to agree by chance.

    A Han character counts as three: it says about as much as three letters.
    """
    texts = (plain(caption.text) for caption in record.captions)
    return sorted({_hash(text) for text in texts if _letters(text) >= at_least})


def _letters(text: str) -> int:
    return len(text) + (LETTERS_OF_HAN - 1) * len(HAN.findall(text))


def distances(
    one: UInt8[np.ndarray, "n 32"], other: UInt8[np.ndarray, "m 32"]
) -> UInt64[np.ndarray, "n m"]:
    """Bits in which each two perceptual hashes differ."""
    a, b = one.view(np.uint64), other.view(np.uint64)
    return np.bitwise_count(a[:, None] ^ b).sum(axis=-1, dtype=np.uint64)


def jaccard(
    one: UInt8[np.ndarray, "n 64"], other: UInt8[np.ndarray, "n 64"]
) -> Float64[np.ndarray, " n"]:
    """Estimated share of common shingles, pair by pair: minima that agree, less those by chance.

    Two records without text share none.
    """
    agree: Bool[np.ndarray, "n 64"] = one == other
    chance = 2.0**-8
    both = one.any(axis=-1) & other.any(axis=-1)  # say anything
    return np.where(both, np.clip((agree.mean(axis=-1) - chance) / (1 - chance), 0.0, 1.0), 0.0)
