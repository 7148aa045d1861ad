# SPDX-License-Identifier: Apache-2.0
"""Questions made from annotations: COCO, Visual Genome, VQA."""

import json

import pytest

from m2jax.config import UserError
from m2jax.eval import sets
from m2jax.eval.sets import coco_names, vqa
from m2jax.eval.sets.records import Asked, Labelled, Place


@pytest.fixture
def coco(tmp_path):
    content = {
        "categories": [{"id": 3, "name": "mouse"}, {"id": 1, "name": "bus"}],
        "images": [{"id": 9, "file_name": "9.jpg"}, {"id": 4, "file_name": "4.jpg"}],
        "annotations": [
            {"image_id": 9, "category_id": 3},
            {"image_id": 9, "category_id": 3},
            {"image_id": 9, "category_id": 1, "iscrowd": 1},
        ],
    }
    file = tmp_path / "annotations" / "instances_val2017.json"
    file.parent.mkdir()
    file.write_text(json.dumps(content))
    return tmp_path, file, content


def test_coco_objects_and_counting(coco):
    folder, file, content = coco
    found = sets.read(Place(folder), "coco-objects")
    assert isinstance(found, Labelled)
    assert found.classes == {"en": [("bus",), ("mouse",)], "zh": [("公共汽车",), ("鼠标",)]}
    assert found.labels == [frozenset([0, 1]), frozenset()]
    counted = sets.read(Place(folder), "coco-count")
    assert isinstance(counted, Asked)
    [question] = counted.questions["en"]  # buses come as a crowd, which has no number
    assert question.texts[0] == "a picture with one mouse."
    assert question.texts[1] == "a picture with two mice."
    assert question.credit == [0, 1, 0, 0, 0]
    assert counted.questions["zh"][0].texts[1] == "图中有两个鼠标。"
    content["annotations"][0]["image_id"] = 77
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="an annotation of no image"):
        sets.read(Place(folder), "coco-count")


def test_every_category_has_a_chinese_name_and_a_plural():
    assert len(coco_names.CHINESE) == 80
    assert len(set(coco_names.CHINESE.values())) == 80
    found = [coco_names.plural(c) for c in ("bus", "sandwich", "sheep", "person", "dog", "knife")]
    assert found == ["buses", "sandwiches", "sheep", "people", "dogs", "knives"]


def box(name, x, y):
    return {"names": [name], "x": x, "y": y, "w": 10, "h": 10}


def test_visual_genome_asks_only_what_boxes_agree_with(tmp_path):
    rows = [
        {"predicate": "LEFT OF", "subject": box("cup", 0, 0), "object": box("plate", 50, 5)},
        {"predicate": "above", "subject": box("cup", 0, 0), "object": box("cat", 50, 5)},
        {"predicate": "on", "subject": box("cup", 0, 0), "object": box("table", 0, 30)},
        {"predicate": "riding", "subject": box("man", 0, 0), "object": box("horse", 0, 30)},
        {"predicate": "riding", "subject": box("cup", 0, 0), "object": box("horse", 0, 30)},
        {"predicate": "holding", "subject": box("boy", 0, 0), "object": box("kite", 0, 30)},
        {"predicate": "flying", "subject": box("boy", 0, 0), "object": box("kite", 0, 30)},
    ]
    file = tmp_path / "relationships.json"
    file.write_text(json.dumps([{"image_id": 5, "relationships": rows}]))
    given = {"zh": {"cup": ("杯子",), "plate": ("盘子",)}}
    found = sets.read(Place(tmp_path, names=given), "vg-position")
    assert isinstance(found, Asked)
    [question] = found.questions["en"]  # the boxes do not say above
    assert question.texts[0] == "the cup is to the left of the plate."
    assert question.credit == [1, 0, 0, 0]
    assert found.questions["zh"][0].texts[0] == "杯子在盘子的左边。"
    acts = sets.read(Place(tmp_path), "vg-interaction")
    assert isinstance(acts, Asked)
    assert list(acts.questions) == ["en"]
    [question] = acts.questions["en"]  # of two acts with one thing none is the answer
    assert question.texts[0] == "a man riding a horse."
    assert len(set(question.texts)) == 4
    assert acts.questions == sets.read(Place(tmp_path), "vg-interaction").questions  # fixed
    assert len(acts.images) == 1
    for row in rows[:2]:  # a second cup, elsewhere: of which is it said?
        row["subject"] = box("cup", 0, 40 * rows.index(row))
    rows.append({"predicate": "below", "subject": box("dog", 9, 90), "object": box("cat", 9, 5)})
    rows.append({"predicate": "below", "subject": box("pan", 9, 90), "object": box("cat", 9, 5)})
    rows[1]["object"] = box("bird", 50, 5)
    file.write_text(json.dumps([{"image_id": 5, "relationships": rows}]))
    found = sets.read(Place(tmp_path), "vg-position")
    assert isinstance(found, Asked)
    said = [(q.image, q.texts[q.credit.index(1)]) for q in found.questions["en"]]
    assert said == [(0, "the dog is below the cat."), (0, "the pan is below the cat.")]
    assert len(found.images) == 1  # it is read and encoded once
    listed = [{"predicate": "on", "subject": [box("cup", 0, 0)], "object": box("cat", 0, 9)}]
    for relationships in (listed, None):
        file.write_text(json.dumps([{"image_id": 5, "relationships": relationships}]))
        with pytest.raises(UserError, match="no relationships file"):
            sets.read(Place(tmp_path), "vg-position")
    file.write_text('[{"image_id": 5}]')
    with pytest.raises(UserError, match="no relationships file"):
        sets.read(Place(tmp_path), "vg-position")


def answers(*texts):
    return [{"answer": text} for text in texts]


def test_vqa_credit_is_the_leave_one_out_mean():
    """Antol et al. 2015: of ten people, three who agree give an answer 0.9, four give 1."""
    human = ["yes"] * 4 + ["no"] * 3 + ["maybe"] * 2 + ["a cat"]
    expected = {"yes": 1.0, "no": 0.9, "maybe": 0.6, "a cat": 0.3, "dog": 0.0}
    for answer, value in expected.items():
        assert vqa.credit(answer, human) == pytest.approx(value)
    assert vqa.normal(" A  Cat. ") == "a cat"


def test_vqa_ranks_listed_candidates_or_frequent_answers(tmp_path):
    question = {"question_id": 1, "image_id": 42, "question": "What is it? "}
    rows = {"question_id": 1, "question_type": "what", "answers": answers(*["cat"] * 10)}
    asked = tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json"
    asked.write_text(json.dumps({"questions": [question]}))
    right = tmp_path / "v2_mscoco_val2014_annotations.json"
    right.write_text(json.dumps({"annotations": [rows]}))
    place = Place(tmp_path, "val2014")
    with pytest.raises(UserError, match=r"needs one \*train\*annotations"):
        sets.read(place, "vqa")
    many = [{**rows, "answers": answers("cat", "dog", "Cat.")}]
    train = tmp_path / "v2_mscoco_train2014_annotations.json"
    train.write_text(json.dumps({"annotations": many}))
    found = sets.read(place, "vqa")
    assert isinstance(found, Asked)
    [one] = found.questions["en"]
    assert one.texts == ["What is it? cat", "What is it? dog"]
    assert one.credit == [1, 0]
    assert found.images.paths == [tmp_path / "val2014" / "COCO_val2014_000000000042.jpg"]  # pyright: ignore
    listed = {**question, "multiple_choices": ["dog", "cat", "cow"]}
    asked.write_text(json.dumps({"questions": [listed]}))
    [one] = sets.read(place, "vqa").questions["en"]  # pyright: ignore
    assert len(one.texts) == 3
    right.write_text('{"annotations": []}')
    with pytest.raises(UserError, match="not VQA's layout"):
        sets.read(place, "vqa")
