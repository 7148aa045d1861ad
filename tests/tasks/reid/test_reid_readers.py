# SPDX-License-Identifier: Apache-2.0
"""Tiny trees in the real layouts, and what is wrong with others."""

import numpy as np
import pytest

from m2jax.config import UserError
from m2jax.data.emoji.identities import Seen
from m2jax.tasks.reid import readers
from m2jax.tasks.reid.readers import cuhk03, market1501, msmt17


def touch(root, *names):
    for name in names:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")
    return root


def market(root):
    touch(
        root / "bounding_box_train",
        "0002_c1s1_000451_03.jpg",
        "0002_c3s1_000551_01.jpg",
        "0007_c6s3_077392_01.jpg",
        "Thumbs.db",
    )
    touch(root / "query", "0001_c1s1_001051_00.jpg")
    touch(
        root / "bounding_box_test",
        "-1_c1s1_000401_03.jpg",
        "0000_c2s1_000301_00.jpg",
        "0001_c2s1_000301_00.jpg",
    )
    return root


def test_market(tmp_path):
    market(tmp_path)
    found = market1501(tmp_path)
    assert found.train.labels.identities.tolist() == [0, 0, 1]
    assert found.train.labels.cameras.tolist() == [0, 2, 5]
    assert (found.identities, found.cameras) == (2, 6)
    assert found.query.labels.identities.tolist() == [1]
    # Junk is left out, distractors stay.
    assert found.gallery.labels.identities.tolist() == [0, 1]
    assert found.gallery.files[1].name == "0001_c2s1_000301_00.jpg"


def test_cuhk03(tmp_path):
    for folder, name in (
        ("bounding_box_train", "0003_c1_22.png"),
        ("query", "0001_c1_1.png"),
        ("bounding_box_test", "0001_c2_6.png"),
    ):
        touch(tmp_path / folder, name)
    found = cuhk03(tmp_path)
    assert found.train.labels.identities.tolist() == [0]
    assert found.gallery.labels.cameras.tolist() == [1]


def msmt(root):
    touch(root / "train", "0000/0000_000_01_0303morning_0015_0.jpg")
    touch(root / "train", "0005/0005_003_15_0303noon_0015_0.jpg")
    touch(root / "test", "0000/0000_000_02_0303morning_0015_0.jpg")
    touch(root / "test", "0000/0000_001_04_0303morning_0015_0.jpg")
    lists = {
        "train": "0000/0000_000_01_0303morning_0015_0.jpg 0\n",
        "val": "0005/0005_003_15_0303noon_0015_0.jpg 5\n",
        "query": "0000/0000_000_02_0303morning_0015_0.jpg 0\n\n",
        "gallery": "0000/0000_001_04_0303morning_0015_0.jpg 0\n",
    }
    for name, text in lists.items():
        (root / f"list_{name}.txt").write_text(text)
    return root


def test_msmt17(tmp_path):
    found = msmt17(msmt(tmp_path))
    assert found.train.labels.identities.tolist() == [0, 1]
    assert found.train.labels.cameras.tolist() == [0, 14]
    assert found.gallery.labels.cameras.tolist() == [3]
    assert all(file.is_file() for split in found for file in split.files)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: (r / "query" / "0001_c1s1_001051_00.jpg").unlink(), "query split has no image"),
        (lambda r: touch(r / "query", "holiday.jpg"), "no name of Market-1501"),
        (lambda r: touch(r / "query", "0001_c0s1_001051_00.jpg"), "no name of Market-1501"),
        (lambda r: (r / "query").rename(r / "q"), "query: no such folder"),
    ],
)
def test_market_trees_that_cannot_be(tmp_path, damage, message):
    damage(market(tmp_path))
    with pytest.raises(UserError, match=message):
        market1501(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0000/x.jpg 0", "line 1 is no path"),
        ("0000/0000_000_01_a_0.jpg", "line 1 is no path"),
        ("../0000_000_01_a_0.jpg 0", "leaves train/"),
        ("0000/0000_000_09_a_0.jpg 0", "is missing, though list_val.txt names it"),
        ("", None),
    ],
)
def test_msmt_lists_that_cannot_be(tmp_path, text, message):
    (msmt(tmp_path) / "list_val.txt").write_text(text)
    if message is None:
        assert msmt17(tmp_path).identities == 1
        (tmp_path / "list_val.txt").unlink()
        message = "list_val.txt: unreadable"
    with pytest.raises(UserError, match=message):
        msmt17(tmp_path)


@pytest.mark.parametrize(("layout", "part"), [("emoji", "known"), ("emoji-new-styles", "new")])
def test_the_emoji_set(monkeypatch, layout, part):
    """Concepts are renumbered for training alone, styles stay; each layout has its own test."""
    parts = {
        "train": Seen(np.zeros((3, 4, 4, 3), np.uint8), np.array([7, 3, 7]), np.array([0, 2, 1])),
        "known": Seen(np.ones((2, 4, 4, 3), np.uint8), np.array([5, 5]), np.array([1, 2])),
        "new": Seen(np.full((2, 4, 4, 3), 9, np.uint8), np.array([8, 8]), np.array([5, 6])),
    }
    monkeypatch.setattr(readers.emoji, "load", lambda: None)
    monkeypatch.setattr(readers, "identities", lambda data, name, size: parts[name])
    found = readers.read(layout, None)
    assert found.train.labels.identities.tolist() == [1, 0, 1]
    assert found.train.labels.cameras.tolist() == [0, 2, 1]
    assert found.query is found.gallery
    np.testing.assert_array_equal(found.query.labels.identities, parts[part].identities)
    np.testing.assert_array_equal(found.query.labels.cameras, parts[part].cameras)
    np.testing.assert_array_equal(np.asarray(found.query.images.read(1)), parts[part].images[1])
