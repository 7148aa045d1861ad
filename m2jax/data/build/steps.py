# SPDX-License-Identifier: Apache-2.0
"""What is asked of a record before it is compared with others: one small step per question.

A step takes a record and gives it back, perhaps changed, or says why it is rejected. Steps on
captions drop single captions; a record without any left goes with the reason of the last one.
The thresholds of M2's data (BM-6B): width by height at most 3, at least 5 characters of text.
"""

from __future__ import annotations

import functools
import io
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from PIL import Image

from m2jax.data.build.records import Caption, Record, Rejected
from m2jax.data.image import PIXEL_LIMIT, open_image

FORMATS = ("JPEG", "PNG", "WEBP")  # no other parser sees the bytes
OTHER_FORMATS = {b"GIF8": "GIF", b"BM": "BMP", b"II*\0": "TIFF", b"MM\0*": "TIFF"}
LANGUAGES = ("en", "zh")
HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]")
KANA = re.compile(r"[\u3041-\u3096\u30a1-\u30fa\u30fc\u31f0-\u31ff]")
HANGUL = re.compile(r"[\u1100-\u11ff\uac00-\ud7af]")
FOREIGN = 4  # kana or hangul is Japanese or Korean from one letter in so many
HIDDEN = re.compile(  # control characters, zero-width ones, marks of writing direction
    r"[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff]"
)
SPACE = re.compile(r"\s+")
SURE = 0.8  # of another language's probability, above which a text in Latin script is not English
UNLIKELY = 0.05  # of English, below which it may be another language


@dataclass(frozen=True)
class Limits:
    """What a record must keep to; the defaults are M2's where it has any."""

    aspect: float = 3.0  # the longer side by the shorter, at most
    min_side: int = 32  # pixels of the shorter side
    min_text: int = 5  # characters of a caption, after normalisation
    max_text: int = 1000  # characters; more is a page, not a caption
    script: str = "simplified"  # of Chinese: simplified | traditional | keep


class Looked(NamedTuple):
    """A record whose image has been decoded."""

    record: Record
    image: Image.Image


class ImageStep(Protocol):
    """A question about the image."""

    def __call__(self, looked: Looked, limits: Limits) -> str:
        """The reason of rejection with its detail after a colon; "" for none."""
        ...


def decoded(record: Record) -> Looked | Rejected:
    """``decode``: the image decodes whole, is JPEG, PNG or WebP, and is no decompression bomb."""
    try:
        # Reads the header alone. A JPEG with further pictures behind it opens too (PIL: "MPO").
        with Image.open(io.BytesIO(record.image), formats=FORMATS) as image:
            size = image.size
    except Image.DecompressionBombError as error:
        return Rejected(record.key, "decompression bomb", str(error))
    except Exception as error:  # parsers of damaged headers raise what they like
        if kind := _other_format(record.image):
            return Rejected(record.key, "image format", f"{kind}: none of {', '.join(FORMATS)}")
        return Rejected(record.key, "undecodable image", told(error))
    if size[0] * size[1] > PIXEL_LIMIT:
        return Rejected(record.key, "decompression bomb", f"{size[0]} x {size[1]} pixels")
    try:
        found = open_image(io.BytesIO(record.image), record.key)
        if found.has_transparency_data or found.mode != "RGB":  # fails without a palette
            found.convert("RGB")  # as all who use it will
        return Looked(record, found)
    except Exception as error:
        return Rejected(record.key, "undecodable image", told(error))


def _other_format(data: bytes) -> str:
    """The format of bytes that begin like an image nobody decodes here; "" for none."""
    if data[4:8] == b"ftyp":
        return "AVIF or HEIF"
    return next((kind for start, kind in OTHER_FORMATS.items() if data.startswith(start)), "")


def told(error: Exception) -> str:
    """What an error says, without addresses in memory: two builds must write the same."""
    return re.sub(r"<[^<>]* at 0x[0-9a-f]+>", "bytes", f"{type(error).__name__}: {error}")[:200]


def min_side(looked: Looked, limits: Limits) -> str:
    """``image too small``: the shorter side has too few pixels to show anything."""
    width, height = looked.image.size
    small = min(width, height) < limits.min_side
    return f"image too small: {width} x {height}" if small else ""


def aspect(looked: Looked, limits: Limits) -> str:
    """``aspect ratio``: banners and strips."""
    width, height = looked.image.size
    long = max(width, height) > limits.aspect * min(width, height)
    return f"aspect ratio: {width} x {height}" if long else ""


IMAGE_STEPS: tuple[ImageStep, ...] = (min_side, aspect)


def normalised(text: str) -> str:
    """NFKC, without control and invisible characters, runs of white space as one blank."""
    return SPACE.sub(" ", HIDDEN.sub("", unicodedata.normalize("NFKC", text))).strip()


def identified(text: str) -> str:
    """``en``, ``zh``, or the code of another language ("und" where there is no letter).

    Scripts decide first: kana or hangul is neither where it is a quarter of the letters (a single
    "の" decorates Chinese too), and Han is Chinese where it is at least a fifth of them (brand
    names stand in Latin script). Latin script is English unless the classifier is sure of another
    language: it errs on short captions, and a lost English one costs more.
    """
    letters = sum(map(str.isalpha, text))
    if not letters:
        return "und"
    for script, language in ((KANA, "ja"), (HANGUL, "ko")):
        if FOREIGN * len(script.findall(text)) >= letters:
            return language
    if 5 * len(HAN.findall(text)) >= letters:
        return "zh"
    ranks = dict(_classifier().rank(text))
    best = max(ranks, key=lambda language: ranks[language])
    latin = sum("LATIN" in unicodedata.name(c, "") for c in text if c.isalpha())
    if 2 * latin < letters:
        return best if best not in LANGUAGES else "und"
    other = ranks[best] >= SURE and ranks["en"] < UNLIKELY and best not in LANGUAGES
    return best if other else "en"


@functools.cache
def _classifier() -> Any:
    from py3langid import langid

    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


def declared(code: str) -> str:
    """The language that a code such as ``zh-Hans`` names, where it is one of ours; else ""."""
    language = re.split("[-_]", code, maxsplit=1)[0].lower()
    return language if language in LANGUAGES else ""


def in_script(text: str, script: str) -> str:
    """Chinese text in simplified or traditional characters, by OpenCC's phrases."""
    return text if script == "keep" else _converter(script).convert(text)


@functools.cache
def _converter(script: str) -> Any:
    import opencc

    return opencc.OpenCC({"simplified": "t2s", "traditional": "s2t"}[script])


def caption_steps(caption: Caption, limits: Limits) -> Caption | str:
    """Normalises a caption, or gives the reason why it goes.

    A caption that says it is English or Chinese is believed; others are identified.
    """
    text = normalised(caption.text)
    if not text:
        return "no text"
    language = declared(caption.language) if any(map(str.isalpha, text)) else "und"
    language = language or identified(text)
    if language not in LANGUAGES:
        return f"language: {language}: {text[:60]!r}"
    if language == "zh":
        text = in_script(text, limits.script)
    if len(text) < limits.min_text:
        return f"text too short: {text!r}"
    if len(text) > limits.max_text:
        return f"text too long: {len(text)} characters"
    return Caption(text, language)


def captioned(record: Record, limits: Limits) -> Iterator[Record | Rejected]:
    """The steps on captions: dropped ones first, then the record, unless none is left.

    Rejections of single captions have ``caption`` in front of their reason: the record goes on.
    """
    kept: list[Caption] = []
    dropped: list[tuple[str, str]] = []
    for caption in record.captions:
        found = caption_steps(caption, limits)
        if isinstance(found, str):
            dropped.append(_parts(found))
        elif found not in kept:
            kept.append(found)
    if not kept:
        reason, detail = dropped[-1] if dropped else ("no text", "")
        yield Rejected(record.key, reason, detail)
        return
    for reason, detail in dropped:
        yield Rejected(record.key, f"caption: {reason}", detail)
    yield record.with_captions(tuple(kept))


def alike(record: Record, limits: Limits) -> Record:
    """A record of an evaluation set with captions as those it is compared with: none is dropped."""
    captions = (normalised(caption.text) for caption in record.captions)
    scripted = (in_script(t, limits.script) if HAN.search(t) else t for t in captions)
    return record.with_captions(tuple(Caption(text) for text in scripted))


def _parts(found: str) -> tuple[str, str]:
    """Reason and detail."""
    reason, _, detail = found.partition(": ")
    return reason, detail


def checked(record: Record, limits: Limits, *, texts: bool = True) -> Iterator[Looked | Rejected]:
    """All steps on one record, in order; ends with the record unless it was rejected.

    Args:
        record: as a reader gave it.
        limits: to keep to.
        texts: ask about captions too; evaluation sets lose none, whatever theirs are.
    """
    looked = decoded(record)
    if isinstance(looked, Rejected):
        yield looked
        return
    for step in IMAGE_STEPS if texts else ():
        if found := step(looked, limits):
            yield Rejected(record.key, *_parts(found))
            return
    if not texts:
        yield looked._replace(record=alike(record, limits))
        return
    for found in captioned(record, limits):
        yield found if isinstance(found, Rejected) else Looked(found, looked.image)
