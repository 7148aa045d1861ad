# SPDX-License-Identifier: Apache-2.0
"""Identity is a concept, camera is a style: who lies on which side, and what is left out."""

import collections

import numpy as np
import pytest

from m2jax.config import UserError
from m2jax.data import emoji
from m2jax.data.emoji import build
from m2jax.data.emoji.concepts import Concept
from m2jax.data.emoji.dataset import Drawings, EmojiData
from m2jax.data.emoji.identities import CAMERAS, PARTS, TEST_SHARE, identities
from m2jax.data.emoji.split import fraction

COUNT = 60  # concepts; two of three share a base with the next, every tenth is unseen


def concept(number):
    base = f"base{number // 2}"
    names = {"en": f"thing {number}", "zh": f"东西 {number}"}
    return Concept(
        id=number, hexcode=f"{number:X}", names=names, keywords={"en": (), "zh": ()},
        group=0, subgroup=0, base=base, seen=number // 2 % 5 != 4,
    )  # fmt: skip


def drawings(styles, numbers, rng):
    pairs = [(number, style) for style in styles for number in numbers]
    images = rng.integers(0, 256, (len(pairs), 64, 64, 4), dtype=np.uint8)
    return Drawings(
        images, np.array([number for number, _ in pairs], np.int32), tuple(s for _, s in pairs)
    )


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    concepts = tuple(concept(number) for number in range(COUNT))
    seen = [c.id for c in concepts if c.seen]
    splits = {
        "train": drawings(CAMERAS[:4], seen, rng),
        "validation": drawings(CAMERAS[4:5], seen[:10], rng),
        "fluent": drawings(["fluent"], range(COUNT), rng),
        "openmoji": drawings(["openmoji"], range(COUNT - 2), rng),
    }
    return EmojiData(tmp_path, concepts, b"", splits)


def test_nobody_is_on_both_sides(data):
    found = {part: identities(data, part) for part in PARTS}
    bases = {part: {data.concepts[i].base for i in each.identities} for part, each in found.items()}
    assert not bases["train"] & (bases["known"] | bases["new"])
    for base in bases["train"]:
        assert fraction(f"identity {base}") >= TEST_SHARE
    unseen = {c.id for c in data.concepts if not c.seen}
    assert not unseen & set(found["known"].identities)
    assert set(found["known"].identities) | (unseen - {58, 59}) == set(found["new"].identities)
    # All that training styles draw of seen concepts is on one of the sides, validation too.
    drawn = len(found["train"].images) + len(found["known"].images)
    assert drawn == len(data.drawings("train")) + len(data.drawings("validation"))
    assert {CAMERAS[c] for c in found["train"].cameras} == set(CAMERAS[:5])
    assert {CAMERAS[c] for c in found["new"].cameras} == {"fluent", "openmoji"}


def test_pixels_belong_to_their_identity_and_style(data):
    found = identities(data, "new", size=32)
    fluent = data.drawings("fluent")
    for row in (0, 7):
        at = np.flatnonzero(fluent.concept == found.identities[row])[0]
        if CAMERAS[found.cameras[row]] != "fluent":
            continue
        image = fluent.images[at].astype(float)
        alpha = image[..., 3:] / 255
        white = image[..., :3] * alpha + 255 * (1 - alpha)
        means = white.reshape(32, 2, 32, 2, 3).mean((1, 3))
        np.testing.assert_allclose(found.images[row], means, atol=1.5)
    assert CAMERAS[found.cameras[0]] == "fluent"


def test_the_order_is_fixed(data):
    one, other = (identities(data, "known") for _ in range(2))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)
    keys = list(zip(one.identities.tolist(), one.cameras.tolist(), strict=True))
    assert keys == sorted(set(keys))


def test_what_cannot_be_told_apart_or_found_again_is_left_out(data):
    """Equal pixels of one style; then the only other drawing of each has no partner."""
    whole = identities(data, "new")
    chosen = np.unique(whole.identities)[:2]
    fluent = data.drawings("fluent")
    rows = [int(np.flatnonzero(fluent.concept == each)[0]) for each in chosen]
    fluent.images[rows[1]] = fluent.images[rows[0]]
    left = identities(data, "new")
    assert set(whole.identities) - set(left.identities) == set(chosen)
    assert min(collections.Counter(left.identities.tolist()).values()) == 2


def test_words_that_mean_nothing(data):
    with pytest.raises(UserError, match="use one of train, known, new"):
        identities(data, "test")
    with pytest.raises(UserError, match="use a divisor"):
        identities(data, "new", size=48)


REAL = emoji.default_directory()


@pytest.mark.skipif(not (REAL / build.MANIFEST).exists(), reason="the real emoji set is not built")
def test_the_real_set():
    real = emoji.load(REAL)
    found = {part: identities(real, part, size=8) for part in PARTS}
    counts = {part: (len(e.images), len(set(e.identities))) for part, e in found.items()}
    assert counts == {"train": (3784, 1004), "known": (1716, 477), "new": (1138, 569)}
