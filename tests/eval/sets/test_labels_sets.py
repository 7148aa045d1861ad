# SPDX-License-Identifier: Apache-2.0
"""VOC 2007, NUS-WIDE and COCO's val2014 as tiny trees in the layouts of their releases."""

import pytest

from m2jax.config import UserError
from m2jax.eval import sets
from m2jax.eval.sets import many_labels
from m2jax.eval.sets.records import Place
from tests.eval import label_trees


@pytest.fixture
def voc(tmp_path):
    return tmp_path, label_trees.voc(tmp_path)


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
    label_trees.nus(tmp_path)
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
    label_trees.coco(tmp_path)
    found = sets.read(Place(tmp_path, "val2014"), "coco-objects")
    assert found.labels == [frozenset(), frozenset([1])]
    assert found.images.paths[0] == tmp_path / "val2014" / "COCO_val2014_000000000005.jpg"
