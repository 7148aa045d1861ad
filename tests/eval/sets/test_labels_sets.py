# SPDX-License-Identifier: Apache-2.0
"""VOC 2007, NUS-WIDE and COCO's val2014 as tiny trees in the layouts of their releases."""

import json

import pytest
from PIL import Image

from m2jax.config import UserError
from m2jax.eval import sets
from m2jax.eval.sets import many_labels
from m2jax.eval.sets.records import Place


@pytest.fixture
def voc(tmp_path):
    root = tmp_path / "VOCdevkit" / "VOC2007"
    main = root / "ImageSets" / "Main"
    main.mkdir(parents=True)
    (root / "JPEGImages").mkdir()
    (main / "test.txt").write_text("000001\n000002\n000004\n")
    for kind in many_labels.VOC:
        marks = {"dog": ("1", "-1", "0"), "person": ("1", "1", "-1")}.get(kind, ("-1",) * 3)
        rows = zip(("000001", "000002", "000004"), marks, strict=True)
        (main / f"{kind}_test.txt").write_text("".join(f"{n} {m:>2}\n" for n, m in rows))
    Image.new("RGB", (4, 3), "red").save(root / "JPEGImages" / "000002.jpg")
    return tmp_path, main


def test_voc_from_above_its_folder_or_inside_it(voc):
    path, main = voc
    classes = list(many_labels.VOC)
    dog, person = classes.index("dog"), classes.index("person")
    for place in (path, path / "VOCdevkit", main.parent.parent):
        found = sets.read(Place(place), "voc2007")
        assert found.labels == [frozenset([dog, person]), frozenset([person]), frozenset([dog])]
    assert found.multi_label
    assert found.images.read(1).size == (4, 3)
    assert len(found.classes["en"]) == len(found.classes["zh"]) == 20
    assert ("dining table",) in found.classes["en"]


def test_voc_lists_that_do_not_go_together_are_refused(voc, tmp_path):
    path, main = voc
    (main / "dog_test.txt").write_text("000001 1\n000002 1\n")
    with pytest.raises(UserError, match=r"dog_test.txt: does not go with test.txt"):
        sets.read(Place(path), "voc2007")
    (main / "dog_test.txt").write_text("000001 1\n000002 7\n000004 1\n")
    with pytest.raises(UserError, match="does not go with"):
        sets.read(Place(path), "voc2007")
    (main / "dog_test.txt").unlink()
    with pytest.raises(UserError, match="No such file"):
        sets.read(Place(path), "voc2007")
    with pytest.raises(UserError, match="holds no ImageSets/Main: name the folder"):
        sets.read(Place(tmp_path / "none"), "voc2007")


@pytest.fixture
def nus(tmp_path):
    truth = tmp_path / "Groundtruth" / "TrainTestLabels"
    for folder in (truth, tmp_path / "ImageList", tmp_path / "Flickr" / "actor"):
        folder.mkdir(parents=True)
    (tmp_path / "Concepts81.txt").write_text("airport\nhouse_pet\n")
    listed = "actor\\0001_2.jpg\nactor\\0002_3.jpg\n"
    (tmp_path / "ImageList" / "TestImagelist.txt").write_text(listed)
    (truth / "Labels_airport_Test.txt").write_text("0\n0\n")
    (truth / "Labels_house_pet_Test.txt").write_text("0\n1\n")
    Image.new("RGB", (5, 2)).save(tmp_path / "Flickr" / "actor" / "0002_3.jpg")
    return tmp_path


def test_nus_wide_keeps_images_without_a_label(nus):
    found = sets.read(Place(nus), "nus-wide")
    assert found.labels == [frozenset(), frozenset([1])]
    assert found.classes == {"en": [("airport",), ("house pet",)]}
    assert found.images.read(1).size == (5, 2)


@pytest.mark.parametrize(
    ("file", "text", "match"),
    [
        ("Groundtruth/TrainTestLabels/Labels_airport_Test.txt", "0\n", "does not go with"),
        ("Groundtruth/TrainTestLabels/Labels_airport_Test.txt", "0\n2\n", "does not go with"),
        ("ImageList/TestImagelist.txt", "..\\x.jpg\na.jpg\n", "leads out of"),
        ("Concepts81.txt", "airport\nairport\n", "damaged"),
        ("Concepts81.txt", "../../x\n", "leads out of|No such file"),
    ],
)
def test_nus_wide_lists_are_checked(nus, file, text, match):
    (nus / file).write_text(text)
    with pytest.raises(UserError, match=match):
        sets.read(Place(nus), "nus-wide")


def test_nus_wide_has_two_splits(nus):
    with pytest.raises(UserError, match="NUS-WIDE has train and test"):
        sets.read(Place(nus, "val"), "nus-wide")


def test_coco_of_2014_keeps_images_without_a_label(tmp_path):
    content = {
        "categories": [{"id": 1, "name": "person"}, {"id": 3, "name": "car"}],
        "images": [{"id": i, "file_name": f"COCO_val2014_{i:012}.jpg"} for i in (5, 6)],
        "annotations": [{"image_id": 6, "category_id": 3}],
    }
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_val2014.json").write_text(json.dumps(content))
    found = sets.read(Place(tmp_path, "val2014"), "coco-objects")
    assert found.labels == [frozenset(), frozenset([1])]
    assert found.images.paths[0] == tmp_path / "val2014" / "COCO_val2014_000000000005.jpg"
