# SPDX-License-Identifier: Apache-2.0
"""Composed scenes show what they say, in one style each, labels held out or not."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2jax.config import UserError
from m2jax.data.emoji.concepts import Concept
from m2jax.data.emoji.dataset import Drawings, EmojiData
from m2jax.tasks.labels import scenes

COUNT = 9


def square(number, style):
    image = np.zeros((64, 64, 4), np.uint8)
    image[..., :3], image[..., 3] = (number * 20 + 5, 200 if style == "b" else 30, 90), 255
    return image


def emoji():
    """Nine coloured squares in two styles, two of them of one base and one never seen."""
    concepts = tuple(
        Concept(
            id=i,
            hexcode=str(i),
            names={"en": f"thing {i}", "zh": f"物{i}"},
            keywords={},
            group=0,
            subgroup=0,
            base=str(min(i, 7)),
            seen=i != 4,
        )
        for i in range(COUNT)
    )
    data = EmojiData(Path(), concepts, b"")
    for style in ("fluent", "openmoji"):
        ids = np.arange(COUNT, dtype=np.int32)
        images = np.stack([square(i, style[0]) for i in ids])
        data._splits[style] = Drawings(images, ids, (style,) * COUNT)
    return data


def test_labels_are_seen_concepts_of_different_bases_and_the_held_out_ones_come_last():
    found = scenes.choose(emoji(), 4, 3)
    assert found.seen == 4
    assert len(found.words) == 7
    assert 4 not in found.concepts  # no style trained on shows it
    assert not {7, 8} <= set(found.concepts.tolist())  # one base
    assert len(set(found.concepts.tolist())) == 7
    assert found.words.names[0]["zh"] == (f"物{found.concepts[0]}",)
    with pytest.raises(UserError, match="use 2 to 7 in all"):
        scenes.choose(emoji(), 6, 3)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 999))
def test_a_scene_shows_its_labels_and_nothing_else(seed):
    data = emoji()
    chosen = scenes.choose(data, 4, 3)
    drawings = data.drawings("fluent")
    made = scenes.compose(data, drawings, chosen, 6, seed=seed)
    again = scenes.compose(data, drawings, chosen, 6, seed=seed)
    np.testing.assert_array_equal(made.shown, again.shown)
    for number in range(6):
        pixels = np.asarray(made.images.read(number))
        np.testing.assert_array_equal(pixels, np.asarray(again.images.read(number)))
        reds = set(np.unique(pixels[..., 0][pixels[..., 3] > 0]).tolist())
        labels = chosen.concepts[made.shown[number]]
        assert reds == {int(i) * 20 + 5 for i in labels}
        assert 2 <= len(labels) <= 4


def test_drawings_that_look_alike_are_left_out():
    data = emoji()
    drawings = data.drawings("fluent")
    drawings.images[1] = drawings.images[2]
    chosen = scenes.choose(data, 7, 0)
    made = scenes.compose(data, drawings, chosen, 60)
    places = [n for n, i in enumerate(chosen.concepts) if i in (1, 2)]
    assert len(places) == 2
    assert not made.shown[:, places].any()
    assert made.shown.any(axis=0).sum() == 5
