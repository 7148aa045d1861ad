# SPDX-License-Identifier: Apache-2.0
"""Scenes say what they show."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2jax.config import Augment, Data, UserError
from m2jax.data.emoji import scenes
from m2jax.data.emoji.concepts import Concept
from m2jax.data.emoji.dataset import Drawings, EmojiData
from m2jax.data.text import SentencePieceTokenizer, train_tokenizer

NAMES = ["sun", "cat", "boat", "tree"]
COLOURS = [(250, 200, 0), (120, 60, 20), (0, 60, 250), (0, 150, 30)]


def square(colour):
    image = np.zeros((64, 64, 4), np.uint8)
    image[..., :3], image[..., 3] = colour, 255
    return image


def emoji():
    """Four coloured squares in two styles; the second style lacks the last one."""
    concepts = tuple(
        Concept(
            id=i, hexcode=str(i), names={"en": name, "zh": f"物{i}"}, keywords={}, group=0,
            subgroup=0, base=str(i),
        )
        for i, name in enumerate(NAMES)
    )  # fmt: skip
    ids = np.array([0, 1, 2, 3, 0, 1, 2], np.int32)
    drawings = Drawings(
        np.stack([square(COLOURS[i]) for i in ids]), ids, ("one",) * 4 + ("two",) * 3
    )
    tokenizer = train_tokenizer([*NAMES, "to the left of", "在的左边", "两三四个", "物0123"], 90)
    data = EmojiData(Path(), concepts, tokenizer)
    data._splits["train"] = drawings
    return data, drawings


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from(scenes.KINDS))
def test_the_caption_is_true_of_the_boxes(seed, kind):
    data, drawings = emoji()
    scene = scenes.compose(data, drawings, np.random.default_rng(seed), kind)
    boxes = np.array([item.box for item in scene.items])
    names = [NAMES[drawings.concept[item.drawing]] for item in scene.items]
    assert boxes.min() >= 0
    assert boxes.max() <= scenes.GRID
    assert (boxes[:, 2:] - boxes[:, :2] >= 14).all()
    assert len({drawings.style[item.drawing] for item in scene.items}) == 1
    for i, a in enumerate(boxes):
        for b in boxes[i + 1 :]:  # apart on one axis at least
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
    english = scene.captions["en"]
    if kind == "count":
        assert english == f"{ {2: 'two', 3: 'three', 4: 'four'}[len(names)] } times {names[0]}"
        assert len(set(names)) == 1
        return
    first, second = boxes
    assert names[0] != names[1]
    assert [english.index(name) for name in names] == sorted(english.index(n) for n in names)
    sizes = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    assert {
        "left": first[2] <= second[0],
        "right": second[2] <= first[0],
        "above": first[3] <= second[1],
        "below": second[3] <= first[1],
        "larger": sizes[0] > 2 * sizes[1],
    }[kind]


def test_the_picture_shows_each_drawing_in_its_box_and_nothing_else():
    data, drawings = emoji()
    for seed in range(20):
        scene = scenes.compose(data, drawings, np.random.default_rng(seed))
        picture = scenes.render(scene, drawings)
        expected = np.zeros_like(picture)
        for item in scene.items:
            left, top, right, bottom = item.box
            expected[top:bottom, left:right] = drawings.images[item.drawing][0, 0]
        np.testing.assert_array_equal(picture, expected)


def batches(**data):
    made, _ = emoji()
    tokenizer = SentencePieceTokenizer(made.tokenizer_model, 12)
    cfg = Data(**{"batch_size": 8, **data})
    return scenes.SceneBatches(made, cfg, tokenizer, size=32, seed=5)


def test_batches_depend_on_the_index_alone_and_rows_are_parts_of_them():
    a, b = batches(), batches()
    whole = a.batch(3, slice(0, 8))
    b.batch(0, slice(0, 8))
    parts = [b.batch(3, slice(0, 4)), b.batch(3, slice(4, 8))]
    for name, rows in whole.items():
        np.testing.assert_array_equal(rows, np.concatenate([part[name] for part in parts]))
    assert whole["image"].shape == (8, 1, 32, 32, 4)
    assert whole["text"].shape == (8, 2, 12)
    assert len(set(whole["concept"].tolist() + a.batch(4, slice(0, 8))["concept"].tolist())) == 16
    assert (a.batch(4, slice(0, 8))["image"] != whole["image"]).any()


def test_what_does_not_go_with_scenes_is_said():
    with pytest.raises(UserError, match=r"data.views=2: a scene is drawn once"):
        batches(views=2)
    with pytest.raises(UserError, match=r"flip=0.5: a mirrored scene belies its caption"):
        batches(augment=Augment(flip=0.5))
    made, _ = emoji()
    tokenizer = SentencePieceTokenizer(made.tokenizer_model, 12)
    with pytest.raises(UserError, match=r"model\.image_size=24"):
        scenes.SceneBatches(made, Data(batch_size=8), tokenizer, size=24, seed=5)


@given(st.integers(2, 40), st.sets(st.integers(0, 39), max_size=30))
def test_so_many_seen_concepts_are_spread_evenly(count, unseen):
    made, _ = emoji()
    concepts = [
        dataclasses.replace(made.concepts[0], id=i, seen=i not in unseen) for i in range(40)
    ]
    made = dataclasses.replace(made, concepts=tuple(concepts))
    ids = np.arange(80, dtype=np.int32) % 40
    drawings = Drawings(np.zeros((80, 64, 64, 4), np.uint8), ids, ("one",) * 40 + ("two",) * 40)
    seen = sorted({*range(40)} - unseen)
    if count > len(seen):
        with pytest.raises(
            UserError, match=rf"data\.concepts={count}: the emoji set has {len(seen)}"
        ):
            scenes.of_concepts(made, drawings, count)
        return
    chosen = scenes.of_concepts(made, drawings, count)
    kept, times = np.unique(chosen.concept, return_counts=True)
    assert len(kept) == count
    assert (times == 2).all()  # in every style
    gaps = np.diff([seen.index(concept) for concept in kept])
    assert gaps.max(initial=1) - gaps.min(initial=len(seen)) <= 1
    assert scenes.of_concepts(made, drawings, 0) is drawings


def test_a_training_of_few_concepts_shows_no_other():
    few = batches(concepts=2).batch(0, slice(0, 8))
    every = batches().batch(0, slice(0, 8))
    assert len(np.unique(few["text"])) < len(np.unique(every["text"]))
    colours = {tuple(row) for row in few["image"].reshape(-1, 4).tolist() if row[3] == 255}
    assert colours == {(*COLOURS[0], 255), (*COLOURS[2], 255)}
