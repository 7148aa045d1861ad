# SPDX-License-Identifier: Apache-2.0
"""Signatures on copies and strangers, and the join against a loop over all pairs."""

import io

import apache_beam as beam
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from m2jax.data.build import duplicates, signatures, stage_read, work
from m2jax.data.build.duplicates import EVALUATION_IMAGE, EVALUATION_TEXT, EXACT, NEAR, REASONS
from m2jax.data.build.plan import Duplicates, Plan
from m2jax.data.build.readers.base import Source
from m2jax.data.build.records import Caption, Record
from tests.data.build import collections_of as made


def hashed(image):
    return signatures.perceptual_hash(image)


def bits(one, other):
    return int(signatures.distances(one[None], other[None])[0, 0])


def photo(number):
    """A picture with coarse and fine detail, as photographs have them."""
    rng = np.random.default_rng(number)
    image = np.zeros((96, 96, 3))
    for cells, strength in ((3, 60), (6, 40), (12, 25), (24, 12)):
        noise = rng.normal(0, strength, (cells, cells, 3)).astype(np.float32)
        layers = [Image.fromarray(noise[..., c]).resize((96, 96), 3) for c in range(3)]
        image += np.stack([np.asarray(layer) for layer in layers], -1)
    return Image.fromarray(np.clip(image + 128, 0, 255).astype(np.uint8))


def saved_again(image, kind, quality, scale):
    out = io.BytesIO()
    side = round(image.width * scale)
    image.resize((side, side), Image.Resampling.BICUBIC).save(out, kind, quality=quality)
    return Image.open(out)


@pytest.mark.parametrize(
    ("kind", "quality", "scale"),
    [("JPEG", 75, 1), ("JPEG", 35, 1), ("JPEG", 80, 0.5), ("JPEG", 80, 2), ("WEBP", 60, 0.75)],
)
def test_images_saved_again_stay_near_and_others_far(kind, quality, scale):
    pictures = [photo(n) for n in range(40)]
    first = np.stack([hashed(p) for p in pictures])
    again = np.stack([hashed(saved_again(p, kind, quality, scale)) for p in pictures])
    found = signatures.distances(first, again)
    assert np.diag(found).max() <= Duplicates().image_bits
    assert found[~np.eye(40, dtype=bool)].min() > 2 * Duplicates().image_bits


def test_symmetric_drawings_have_stable_hashes():
    """Half of their waves vanish; pHash's median then lies among rounding errors."""
    image = Image.new("RGB", (96, 96), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((20, 10, 76, 86), fill="orange")
    draw.rectangle((40, 30, 56, 70), fill="navy")
    for quality in (30, 60, 90):
        assert bits(hashed(image), hashed(saved_again(image, "JPEG", quality, 1))) <= 10


def test_transparency_is_white_and_flat_pictures_are_alike():
    drawing = made.picture(1).convert("RGBA")
    drawing.putalpha(Image.linear_gradient("L").resize(drawing.size))
    white = Image.alpha_composite(Image.new("RGBA", drawing.size, "white"), drawing)
    np.testing.assert_array_equal(hashed(drawing), hashed(white.convert("RGB")))
    flat = [hashed(Image.new("RGB", (40, 40), colour)) for colour in ("red", "white", "black")]
    assert bits(flat[0], flat[1]) == bits(flat[1], flat[2]) == 0


def alike(one, other):
    a, b = (signatures.minhash([Caption(t) for t in texts])[None] for texts in (one, other))
    return float(signatures.jaccard(a, b)[0])


def test_captions_without_case_and_punctuation_are_the_same():
    assert alike(["A red cat, on the mat!"], ["a RED cat on the mat"]) == 1
    assert alike(["一只猫。"], ["一只猫"]) == 1
    assert alike(["a red cat on the mat"], ["completely other words here"]) < 0.2
    assert alike([""], [""]) == 0  # nothing was said: no sign of a copy


@given(st.integers(0, 2**32), st.integers(1, 60), st.integers(0, 60), st.integers(0, 60))
@settings(max_examples=40)
def test_the_estimate_is_the_share_of_common_shingles(seed, both, left, right):
    """MinHash of 64 minima: a standard error of at most 1 / 16; five of them are allowed."""
    rng = np.random.default_rng(seed)
    pieces = ["".join(chr(c) for c in rng.integers(0x4E00, 0x9000, 3)) for _ in range(180)]
    common, one, other = pieces[:both], pieces[60 : 60 + left], pieces[120 : 120 + right]
    # Captions of one shingle each, so that the sets are known.
    estimate = alike([*common, *one], [*common, *other])
    assert abs(estimate - both / (both + left + right)) < 5 / 16


def test_exact_is_of_bytes_and_captions():
    one = Record("a", b"img", (Caption("x", "en"),), "s", "CC0")
    same = Record("b", b"img", (Caption("x", "en"),), "t", "MIT", "u")
    assert signatures.exact(one) == signatures.exact(same)
    for image, text, language in ((b"img2", "x", "en"), (b"img", "y", "en"), (b"img", "x", "zh")):
        other = Record("a", image, (Caption(text, language),), "s", "CC0")
        assert signatures.exact(other) != signatures.exact(one)


def world(rng, count, tests):
    """Signatures in clusters: copies with a few bits and bytes changed."""
    centres = rng.integers(0, 256, (max(1, count // 4), 32), np.uint8)
    texts = rng.integers(0, 256, (max(1, count // 4), 64), np.uint8)
    members = np.zeros(count, duplicates._MEMBER)
    members["rank"] = np.arange(count)
    members["evaluation"] = np.arange(count) < tests
    for row in range(count):
        image = centres[rng.integers(len(centres))].copy()
        for bit in rng.integers(0, 256, rng.integers(0, 30)):
            image[bit // 8] ^= 1 << (bit % 8)
        text = texts[rng.integers(len(texts))].copy()
        text[rng.integers(0, 64, rng.integers(0, 40))] = 7
        members[row]["image"], members[row]["text"] = image, text
    return members


def loop(members, rules):
    """What goes, by the rule's words: a loop over all pairs."""
    gone = {}
    for row, member in enumerate(members):
        if member["evaluation"]:
            continue
        for test in members[members["evaluation"] == 1]:
            if bits(member["image"], test["image"]) <= rules.image_bits:
                gone.setdefault(row, (EVALUATION_IMAGE, int(test["rank"])))
        for earlier in members[:row]:
            if earlier["evaluation"] or row in gone:
                continue
            image = bits(member["image"], earlier["image"]) <= rules.image_bits
            text = signatures.jaccard(member["text"][None], earlier["text"][None])[0]
            text = text >= rules.jaccard
            if {"both": image and text, "image": image, "text": text, "none": False}[rules.near]:
                gone[row] = (NEAR, int(earlier["rank"]))
    return gone


@given(
    st.integers(0, 2**32),
    st.integers(1, 40),
    st.integers(0, 5),
    st.sampled_from(["both", "image", "text", "none"]),
)
@settings(max_examples=40, deadline=None)
def test_a_group_is_compared_as_a_loop_would(seed, count, tests, near):
    members = world(np.random.default_rng(seed), count, tests)
    rules = Duplicates(near=near)
    found = duplicates.compare(duplicates._IMAGE, members, rules)
    assert {f.rank: (REASONS[f.reason], f.of) for f in found} == loop(members, rules)


def test_groups_past_a_block_and_past_the_limit(monkeypatch):
    members = world(np.random.default_rng(1), 90, 3)
    expected = loop(members, Duplicates())
    monkeypatch.setattr(duplicates, "BLOCK", 7)
    found = list(duplicates.compare(duplicates._IMAGE, members, Duplicates()))
    assert {f.rank: (REASONS[f.reason], f.of) for f in found} == expected
    monkeypatch.setattr(duplicates, "GROUP_ROWS", 20)
    short = {f.rank for f in duplicates.compare(duplicates._IMAGE, members, Duplicates())}
    assert {rank for rank in expected if rank < 20} <= short <= set(expected)


def units_of(plan, arrays):
    """Writes signature files as the first stage does."""
    for ordinal, (exact, image, text, long) in enumerate(arrays):
        with work.folder(stage_read.place(plan, ordinal)) as folder:
            work.write_arrays(
                folder / stage_read.SIGNATURES,
                exact=np.array(exact, np.uint64),
                image=image,
                text=text,
                long=np.array(long, np.uint64).reshape(-1, 2),
            )


@pytest.mark.parametrize("parts", [1, 3])
def test_the_join_finds_each_kind_whatever_the_passes(tmp_path, parts):
    rng = np.random.default_rng(0)
    test_image, near_image = rng.integers(0, 256, (2, 32), np.uint8)
    other = rng.integers(0, 256, (3, 32), np.uint8)
    texts = rng.integers(0, 256, (5, 64), np.uint8)
    changed = near_image.copy()
    changed[:5] ^= 3  # ten bits
    plan = Plan(tmp_path, (Source("s", "tars", ()),))
    units_of(
        plan,
        [
            ([1], test_image[None], texts[:1], [(0, 77)]),
            ([2, 3], np.stack([near_image, other[0]]), texts[:2], [(1, 88)]),
            (
                [2, 4, 5, 6, 7],
                np.stack([other[1], changed, test_image, other[2], near_image]),
                np.stack([texts[2], texts[0], texts[3], texts[4], texts[3]]),
                [(3, 77), (0, 88)],
            ),
        ],
    )
    units = [(0, True), (1, False), (2, False)]
    for part in range(parts):
        with beam.Pipeline() as pipeline:
            duplicates.find(pipeline, plan, units, part, parts)
    assert duplicates.gone(plan, parts, 1) == []
    found = [(f.rank & 7, REASONS[f.reason], f.of) for f in duplicates.gone(plan, parts, 2)]
    first = duplicates.rank(1, 0)
    assert found == [
        (0, EXACT, first),
        (1, NEAR, first),
        (2, EVALUATION_IMAGE, 0),
        (3, EVALUATION_TEXT, 0),
    ]  # the fifth has the image of the first with another text, and stays


@pytest.mark.parametrize(("near", "gone"), [("text", {1}), ("image", {2}), ("none", set())])
def test_alike_may_be_the_text_alone_or_the_image_alone(tmp_path, near, gone):
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (3, 32), np.uint8)
    texts = rng.integers(0, 256, (3, 64), np.uint8)
    images[2], texts[1] = images[0], texts[0]
    texts[1, :9] ^= 1  # 55 of 64 minima agree
    images[2, :4] ^= 7  # 12 bits
    plan = Plan(tmp_path, (Source("s", "tars", ()),), duplicates=Duplicates(near=near))
    units_of(plan, [([1, 2, 3], images, texts, [])])
    with beam.Pipeline() as pipeline:
        duplicates.find(pipeline, plan, [(0, False)], 0, 1)
    assert {found.rank for found in duplicates.gone(plan, 1, 0)} == gone
