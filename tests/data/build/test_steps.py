# SPDX-License-Identifier: Apache-2.0
"""Each step on what it is there for, and on its border."""

import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from m2jax.data.build import steps
from m2jax.data.build.records import Caption, Record, Rejected, decode, encode
from m2jax.data.build.steps import Limits, Looked
from tests.data.build import collections_of as made

LIMITS = Limits()
GOOD = "a red house in the rain"


def record(image, *captions):
    found = (c if isinstance(c, Caption) else Caption(c) for c in captions or (GOOD,))
    data = image if isinstance(image, bytes) else made.encoded(image)
    return Record("s/f#1", data, tuple(found), "s", "CC0")


def outcome(one, limits=LIMITS):
    """The reasons, or "kept"."""
    return [r.reason if isinstance(r, Rejected) else "kept" for r in steps.checked(one, limits)]


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(side):
    """A PNG whose header says side x side, of little data."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_the_three_formats_pass_and_cut_ones_do_not(kind):
    data = made.encoded(made.picture(3, 64), kind)
    assert outcome(record(data)) == ["kept"]
    assert outcome(record(data[: len(data) // 2])) == ["undecodable image"]
    assert outcome(record(data[:12])) in (["undecodable image"], ["image format"])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "undecodable image"),
        (b"<html>404</html>", "undecodable image"),
        (made.encoded(made.picture(1), "GIF"), "image format"),
        (made.encoded(made.picture(1), "BMP"), "image format"),
        (bomb(9_000), "decompression bomb"),  # over our limit, under PIL's error
        (bomb(60_000), "decompression bomb"),
    ],
)
def test_what_is_no_image_we_take(data, reason):
    assert outcome(record(data)) == [reason]


@given(st.binary(max_size=200), st.sampled_from(["JPEG", "PNG", "WEBP"]), st.integers(0, 400))
def test_no_bytes_end_the_build(noise, kind, at):
    data = made.encoded(made.picture(1), kind)
    damaged = data[:at] + noise + data[at + len(noise) :]
    for one in (noise, damaged):
        assert len(list(steps.checked(record(one), LIMITS))) == 1


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((96, 32), "kept"),
        ((97, 32), "aspect ratio"),
        ((32, 97), "aspect ratio"),
        ((31, 40), "image too small"),
        ((32, 32), "kept"),
    ],
)
def test_sizes(size, reason):
    assert outcome(record(Image.new("RGB", size))) == [reason]
    assert outcome(record(Image.new("RGB", size)), Limits(aspect=4, min_side=1)) == ["kept"]


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("Ｈｅｌｌｏ　ｗｏｒｌｄ", "Hello world"),
        ("a\u200bb\u202ec\ufeff", "abc"),
        ("  two \n\t lines\u3000here ", "two lines here"),
        ("e\u0301te\u0301", "été"),
        ("①②", "12"),
        ("bell\x07 and \x9fmore", "bell and more"),
    ],
)
def test_normalisation(text, normal):
    assert steps.normalised(text) == normal


@given(st.text())
def test_normalisation_is_done_once(text):
    once = steps.normalised(text)
    assert steps.normalised(once) == once
    assert steps.identified(once) in steps.LANGUAGES or len(steps.identified(once)) >= 2


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("a cat on the mat", "en"),
        ("red apple", "en"),
        ("dog face", "en"),  # which the classifier takes for Danish, unsurely
        ("iPhone 6 case, black", "en"),
        ("一只猫", "zh"),
        ("苹果 iPhone 手机壳", "zh"),
        ("漢字", "zh"),
        ("かわいい猫がいます", "ja"),
        ("超可爱の猫咪抱枕", "zh"),  # one decorative kana
        ("达・芬奇的画", "zh"),
        ("the の sign of a small cafe", "en"),
        ("고양이 사진", "ko"),
        ("Ein Hund sitzt auf der Bank", "de"),
        ("le chat est sur la table", "fr"),
        ("un perro en la calle con su dueño", "es"),
        ("12 / 34", "und"),
        ("", "und"),
    ],
)
def test_languages(text, language):
    assert steps.identified(text) == language


def test_cyrillic_is_neither():
    assert steps.identified("Кошка сидит на столе") not in steps.LANGUAGES


def test_captions_are_normalised_identified_and_converted():
    def kept(text, **limits):
        return steps.caption_steps(Caption(text, "xx"), Limits(**limits))

    assert kept("臺灣的一隻貓在睡覺") == Caption("台湾的一只猫在睡觉", "zh")
    assert kept("台湾的一只猫在睡觉", script="traditional") == Caption("臺灣的一隻貓在睡覺", "zh")
    assert kept("臺灣的一隻貓", script="keep") == Caption("臺灣的一隻貓", "zh")
    assert kept("  A  Cat on a mat ") == Caption("A Cat on a mat", "en")
    assert kept("cats").startswith("text too short: ")
    assert kept("cats!") == Caption("cats!", "en")
    assert kept("四个字的") == "text too short: '四个字的'"
    assert kept("x" * 20, max_text=19).startswith("text too long")
    assert kept("\u200b \n") == "no text"
    assert kept("1234567").startswith("language: und")


def test_a_declared_language_is_believed():
    def kept(text, language):
        return steps.caption_steps(Caption(text, language), Limits())

    german = "Ein Hund sitzt auf der Bank"
    assert kept(german, "").startswith("language: de")
    assert kept(german, "en-US") == Caption(german, "en")
    assert kept(german, "de").startswith("language: de")
    assert kept("東京の写真です", "zh_TW").language == "zh"
    assert kept("1234567", "en").startswith("language: und")


def test_a_record_loses_bad_captions_and_goes_with_its_last():
    several = record(made.picture(1), "cat", "a cat on a mat", "猫", "a  cat on a mat")
    found = list(steps.checked(several, LIMITS))
    assert [getattr(f, "reason", "") for f in found] == ["caption: text too short"] * 2 + [""]
    assert found[-1].record.captions == (Caption("a cat on a mat", "en"),)
    assert outcome(record(made.picture(1), "cat", "")) == ["no text"]
    assert outcome(record(made.picture(1), "", "cat")) == ["text too short"]
    nothing = Record("k", made.encoded(made.picture(1)), (), "s", "")
    assert outcome(nothing) == ["no text"]


def test_evaluation_sets_lose_nothing():
    small = record(Image.new("RGB", (300, 8)), "x", "臺灣的一隻　貓")
    (found,) = steps.checked(small, LIMITS, texts=False)
    assert isinstance(found, Looked)
    # Small and short, but in the script of what it is compared with.
    assert found.record.captions == (Caption("x"), Caption("台湾的一只 猫"))
    assert found.record.image == small.image
    (bad,) = steps.checked(record(b"x"), LIMITS, texts=False)
    assert bad.reason == "undecodable image"


@given(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    st.binary(max_size=50),
    st.lists(
        st.tuples(
            st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
            st.floats(-1, 1, width=32),
        ),
        max_size=4,
    ),
)
def test_records_survive_their_bytes(text, image, captions):
    found = tuple(Caption(t, "en", s, t[::-1]) for t, s in captions)
    one = Record(text, image, found, text, "CC0", text)
    assert decode(encode(one), "here") == one
    assert encode(one) == encode(one)


@pytest.mark.parametrize("data", [b"", b"\xff\xff", b"\n\x04\n\x02\n\x00"])
def test_other_bytes_are_no_record(data):
    from m2jax.config import UserError

    with pytest.raises(UserError, match="row 3: no record of built shards"):
        decode(data, "row 3")
