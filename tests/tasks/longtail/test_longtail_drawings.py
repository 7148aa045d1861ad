# SPDX-License-Identifier: Apache-2.0
"""Emoji as a long-tail table: subgroups are classes, groups places, concepts observations."""

from pathlib import Path

import numpy as np

from m2jax.data.emoji.concepts import GROUPS, Concept
from m2jax.data.emoji.dataset import Drawings, EmojiData
from m2jax.tasks.longtail import drawings, postprocess, table


def emoji():
    """Five concepts in two groups; the last was never seen."""
    places = [(3, 30), (3, 30), (3, 31), (4, 40), (4, 40)]
    concepts = tuple(
        Concept(
            id=i,
            hexcode=f"C{i}",
            names={"en": f"thing {i}"},
            keywords={},
            group=group,
            subgroup=subgroup,
            base=str(i),
            seen=i != 4,
        )
        for i, (group, subgroup) in enumerate(places)
    )
    data = EmojiData(Path(), concepts, b"")
    for split, styles in (("train", ("one", "two")), ("fluent", ("fluent",))):
        ids = np.tile(np.arange(5, dtype=np.int32), len(styles))
        images = np.repeat(ids[:, None, None, None], 4, axis=3).repeat(2, 1).repeat(2, 2)
        names = tuple(style for style in styles for _ in range(5))
        data._splits[split] = Drawings(images.astype(np.uint8), ids, names)
    return data


def test_drawings_become_a_table_with_a_tail():
    train = drawings.part(emoji(), "train")
    assert len(train.rows) == len(train.images) == 8  # the concept never seen is left out
    codes = table.codes(train.rows)
    assert codes.classes == ("3.30", "3.31", "4.40")
    np.testing.assert_array_equal(np.bincount(codes.labels(train.rows)), [4, 2, 2])
    assert codes.values["code"] == tuple(sorted([GROUPS[3], GROUPS[4]]))
    assert codes.values["country"] == ("one", "two")
    pixels = np.asarray(train.images.read(6))
    assert (pixels == 2).all()
    assert train.rows[6].observation == "C2"
    assert train.rows[6].side["country"] == "two"


def test_the_styles_of_the_test_are_countries_never_seen_and_its_groups_are_known():
    train, test = (drawings.part(emoji(), split) for split in ("train", "fluent"))
    codes = table.codes(train.rows)
    assert (codes.places(test.rows, "country") == postprocess.UNKNOWN).all()
    assert (codes.places(test.rows) != postprocess.UNKNOWN).all()
    assert codes.unknown(test.rows)["country"] == {"missing": 0, "unknown": 4}
    both = drawings.part(emoji(), "train", "fluent")
    assert len(both.rows) == 12


def test_observations_are_held_out_whole_and_no_class_loses_its_last():
    train = drawings.part(emoji(), "train")
    kept, held = drawings.without_observations(train, 0.5)
    parts = [{row.observation for row in part.rows} for part in (kept, held)]
    assert not parts[0] & parts[1]
    assert parts[0] | parts[1] == {row.observation for row in train.rows}
    assert {row.label for row in kept.rows} == {row.label for row in train.rows}
    assert [row.label for row in held.rows] == ["3.30", "3.30"]  # both styles of one of its two
    assert len(held.images) == 2
    for part in (kept, held):
        for number, row in enumerate(part.rows):
            assert (np.asarray(part.images.read(number)) == int(row.observation[1:])).all()
    again = drawings.without_observations(train, 0.5)
    assert [row.file for row in again[1].rows] == [row.file for row in held.rows]
    one = drawings.with_classes(train, {"4.40"})
    assert {row.label for row in one.rows} == {"4.40"}
    assert len(one.images) == len(one.rows) == 2
