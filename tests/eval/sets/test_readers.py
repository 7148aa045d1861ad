# SPDX-License-Identifier: Apache-2.0
"""Each layout as its release has it, written small; and what is wrong with hostile ones."""

import io
import json
import os
import tarfile

import numpy as np
import pytest
import scipy.io

from m2jax.config import UserError
from m2jax.eval import sets
from m2jax.eval.sets import names, records
from m2jax.eval.sets.records import Asked, Captioned, Labelled, Place
from tests.data.hostile import TERABYTES
from tests.eval.pictures import save


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pixel(images, row):
    return images.read(row).convert("RGB").getpixel((0, 0))


def test_the_release_file_gives_pictures_captions_and_their_language(tmp_path):
    save(tmp_path / "im" / "a.png", "red")
    save(tmp_path / "im" / "b.png", "blue")
    file = lines(
        tmp_path / "f30k-cn.jsonl",
        {"caption": ["一只红狗", "狗"], "image": "im/a.png"},
        {"caption": ["蓝色的海"], "image": "im/b.png"},
    )
    found = sets.read(Place(file))
    assert isinstance(found, Captioned)
    assert found.captions == {"zh": [["一只红狗", "狗"], ["蓝色的海"]]}
    assert pixel(found.images, 1) == (20, 20, 220)
    english = sets.read(Place(file, language="en"))  # what the user says goes
    assert isinstance(english, Captioned)
    assert list(english.captions) == ["en"]


def test_a_picture_on_several_lines_is_one_picture(tmp_path):
    """As several its own captions would count as another's, and none could be found."""
    file = lines(
        tmp_path / "x.jsonl",
        {"image": "b.png", "caption": "sea"},
        {"image": "a.png", "caption": "dog"},
        {"image": "./b.png", "caption": ["waves", "waves"]},  # what repeats counts as often
    )
    found = sets.read(Place(file))
    assert isinstance(found, Captioned)
    assert found.captions == {"en": [["sea", "waves", "waves"], ["dog"]]}
    assert found.images.paths == [tmp_path / "b.png", tmp_path / "a.png"]  # pyright: ignore


def test_lines_with_captions_in_two_languages_labels_or_questions(tmp_path):
    for name in ("a.png", "b.png"):
        save(tmp_path / name, "red")
    both = {"en": ["red"], "zh": ["红", "红色"]}
    found = sets.read(Place(lines(tmp_path / "c.jsonl", {"image": "a.png", "caption": both})))
    assert isinstance(found, Captioned)
    assert found.captions == {"en": [["red"]], "zh": [["红", "红色"]]}

    rows = {"image": "a.png", "label": "dog"}, {"image": "b.png", "label": "cat"}
    found = sets.read(Place(lines(tmp_path / "l.jsonl", *rows)))
    assert isinstance(found, Labelled)
    assert found.labels == [frozenset([1]), frozenset([0])]
    assert found.classes == {"en": [("cat",), ("dog",)]}
    assert not found.multi_label

    rows = {"image": "a.png", "label": [0, 2]}, {"image": "b.png", "label": []}
    place = Place(lines(tmp_path / "m.jsonl", *rows), names={"zh": [("猫",), ("狗",), ("鸟",)]})
    found = sets.read(place)
    assert isinstance(found, Labelled)
    assert found.labels == [frozenset([0, 2]), frozenset()]
    assert found.multi_label

    row = {"image": "a.png", "question": "how many?", "texts": ["one", "two"], "right": 1}
    found = sets.read(Place(lines(tmp_path / "q.jsonl", row)))
    assert isinstance(found, Asked)
    [question] = found.questions["en"]
    assert question.texts == ["how many? one", "how many? two"]
    assert question.credit == [0, 1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "../a.png", "caption": ["x"]}, "leads out of"),
        ({"image": "/etc/passwd", "caption": ["x"]}, "leads out of"),
        ({"image": 3, "caption": ["x"]}, "no path of an image"),
        ({"image": "a\x00.png", "caption": ["x"]}, "no path of an image"),
        ({"image": "a.png", "caption": []}, "no list of texts"),
        ({"image": "a.png", "caption": [1]}, "no list of texts"),
        ({"image": "a.png"}, "has none of caption, label, texts"),
        ({"image": "a.png", "label": 1}, "labels are numbers: give their names"),
        ({"image": "a.png", "label": True}, "labels are numbers"),
        ({"image": "a.png", "texts": ["a", "b"], "right": 2}, "points at none"),
        ({"image": "a.png", "texts": ["a"], "right": 0}, "points at none"),
        ([1], "no object"),
    ],
)
def test_a_bad_line_is_named(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        sets.read(Place(lines(tmp_path / "x.jsonl", row)))


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\xff\xfe"])
def test_a_damaged_file_of_lines_is_one_line_of_error(tmp_path, text):
    file = tmp_path / "x.jsonl"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"x\.jsonl"):
        sets.read(Place(file))
    with pytest.raises(UserError, match="No such file"):
        sets.read(Place(tmp_path / "none.jsonl"))


def tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as out:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return path


def encoded(tmp_path, colour):
    return save(tmp_path / "made" / f"{colour}.png", colour).read_bytes()


def array(*values):
    out = io.BytesIO()
    np.save(out, np.array(values))
    return out.getvalue()


def test_benchmark_folders_of_each_type(tmp_path):
    red, blue = (encoded(tmp_path, c) for c in ("red", "blue"))
    root = tmp_path / "wds"
    tar(root / "test" / "0.tar", {"s0.png": red, "s0.cls": b"1"})
    tar(root / "test" / "1.tar", {"s1.png": blue, "s1.cls": b"0"})
    (root / "test" / "nshards.txt").write_text("2\n")
    (root / "classnames.txt").write_text("blue\nred\n")
    (root / "zeroshot_classification_templates.txt").write_text("a one\n")
    with pytest.raises(UserError, match=r"templates\.txt: a prompt lacks"):
        sets.read(Place(root))
    (root / "zeroshot_classification_templates.txt").write_text("a {c} one\n\n")
    found = sets.read(Place(root))
    assert isinstance(found, Labelled)
    assert found.labels == [frozenset([1]), frozenset([0])]
    assert found.classes == {"en": [("blue",), ("red",)]}
    assert found.templates == {"en": ["a {c} one"]}
    assert pixel(found.images, 1) == (20, 20, 220)
    chinese = sets.read(Place(root, names={"zh": [("蓝",), ("红",)]}))
    assert isinstance(chinese, Labelled)
    assert set(chinese.classes) == {"en", "zh"}
    with pytest.raises(UserError, match="--split test"):
        sets.read(Place(root, "train"))

    tar(root / "test" / "0.tar", {"s0.png": red, "s0.npy": array(1, 1)})
    tar(root / "test" / "1.tar", {"s1.png": blue, "s1.npy": array(0, 0)})
    found = sets.read(Place(root))
    assert isinstance(found, Labelled)
    assert found.multi_label
    assert found.labels == [frozenset([0, 1]), frozenset()]

    pattern = tmp_path / "captions" / "*.tar"
    tar(tmp_path / "captions" / "a.tar", {"x/1.png": red, "x/1.txt": b"red\n\na red square\n"})
    found = sets.read(Place(pattern))
    assert isinstance(found, Captioned)
    assert found.captions == {"en": [["red", "a red square"]]}


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.cls": b"1"}, "samples need an image and a label"),
        ({"a.png": b"x", "b.png": b"x", "b.cls": b"0"}, "all the same kind"),
        ({"a.png": b"x", "a.cls": b"one"}, "no label"),
        ({"a.png": b"x", "a.cls": b"-1"}, "below 0"),
        ({"a.png": b"x", "a.cls": b"7"}, "a class past the 2 named"),
        ({"a.png": b"x", "a.npy": array(0, 2)}, "no row of zeros and ones"),
        ({"a.png": b"x", "a.npy": array(object())[:80]}, "no label"),
        ({"a.png": b"x", "a.npy": TERABYTES}, "no label \\(claims float32"),
        ({"a.png": b"x", "a.txt": b"\xff"}, "not UTF-8"),
        ({"a.png": b"x", "a.txt": b"\n"}, "no caption"),
    ],
)
def test_bad_samples_are_named(tmp_path, members, message):
    file = tar(tmp_path / "bad.tar", members)
    with pytest.raises(UserError, match=message) as error:
        sets.read(Place(file, names={"en": [("a",), ("b",)]}))
    assert "bad.tar" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_pickled_label_is_not_loaded(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    out = io.BytesIO()
    np.save(out, np.array([Hostile()], object), allow_pickle=True)
    file = tar(tmp_path / "p.tar", {"a.png": b"x", "a.npy": out.getvalue()})
    with pytest.raises(UserError, match="no label"):
        sets.read(Place(file, names={"en": [("a",)]}))
    assert not (tmp_path / "executed").exists()


def test_cut_and_wrong_tars_are_refused(tmp_path):
    whole = tar(tmp_path / "a.tar", {"a.png": b"x" * 4000, "a.cls": b"0"}).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:2000])
    (tmp_path / "zip.tar").write_bytes(b"PK" * 600)
    for name in ("cut.tar", "zip.tar"):
        with pytest.raises(UserError, match=name):
            sets.read(Place(tmp_path / name, names={"en": [("a",)]}))
    found = sets.read(Place(tmp_path / "a.tar", names={"en": [("a",)]}))
    with pytest.raises(UserError, match=r"a\.png.*unreadable image"):
        found.images.read(0)


def test_folders_by_class_and_names_by_folder(tmp_path):
    save(tmp_path / "val" / "n02" / "b.png", "blue")
    save(tmp_path / "val" / "n01" / "a.PNG", "red")
    (tmp_path / "val" / "n01" / "notes.txt").write_text("no picture")
    given = {"en": {"n01": ("tench", "tinca"), "n02": ("goldfish",), "n03": ("more",)}}
    found = sets.read(Place(tmp_path, "val", names=given))
    assert isinstance(found, Labelled)
    assert found.labels == [frozenset([0]), frozenset([1])]
    assert found.classes["en"] == [("tench", "tinca"), ("goldfish",)]
    with pytest.raises(UserError, match="no name for 'n02'"):
        sets.read(Place(tmp_path, "val", names={"en": {"n01": ("tench",)}}))
    with pytest.raises(UserError, match="3 names in en for 2 classes"):
        sets.read(Place(tmp_path, "val", names={"en": [("a",)] * 3}))


def test_cub_takes_its_split_and_plain_names(tmp_path):
    (tmp_path / "images.txt").write_text("1 001.Red_bird/r.png\n2 002.Blue_bird/b.png\n")
    (tmp_path / "image_class_labels.txt").write_text("1 1\n2 2\n")
    (tmp_path / "train_test_split.txt").write_text("1 1\n2 0\n")
    (tmp_path / "classes.txt").write_text("1 001.Red_bird\n2 002.Blue_bird\n")
    save(tmp_path / "images" / "002.Blue_bird" / "b.png", "blue")
    found = sets.read(Place(tmp_path))  # found by its files
    assert isinstance(found, Labelled)
    assert found.labels == [frozenset([1])]
    assert found.classes["en"] == [("Red bird",), ("Blue bird",)]
    assert pixel(found.images, 0) == (20, 20, 220)
    train = sets.read(Place(tmp_path, "train"))
    assert isinstance(train, Labelled)
    assert train.labels == [frozenset([0])]
    (tmp_path / "image_class_labels.txt").write_text("1 1\n2 9\n")
    with pytest.raises(UserError, match="class '9' of 2"):
        sets.read(Place(tmp_path))


def test_dogs_and_cars_read_their_matlab_lists(tmp_path):
    for folder, colour in (("n1-Red_dog", "red"), ("n2-Blue_dog", "blue")):
        save(tmp_path / "Images" / folder / "x.png", colour)
    cell = np.array([["n2-Blue_dog/x.png"], ["n1-Red_dog/x.png"]], object)
    scipy.io.savemat(tmp_path / "test_list.mat", {"file_list": cell, "labels": [[2], [1]]})
    found = sets.read(Place(tmp_path), "dogs")
    assert isinstance(found, Labelled)
    assert found.labels == [frozenset([1]), frozenset([0])]
    assert found.classes["en"] == [("Red dog",), ("Blue dog",)]
    assert pixel(found.images, 0) == (20, 20, 220)

    (tmp_path / "devkit").mkdir()
    meta = {"class_names": np.array([["Red 1999", "Blue 2000"]], object)}
    scipy.io.savemat(tmp_path / "devkit" / "cars_meta.mat", meta)
    rows = np.array([("00001.jpg", 2)], dtype=[("fname", object), ("class", object)])
    scipy.io.savemat(tmp_path / "cars_test_annos_withlabels.mat", {"annotations": rows})
    found = sets.read(Place(tmp_path), "cars")
    assert isinstance(found, Labelled)
    assert found.labels == [frozenset([1])]
    assert found.images.paths == [tmp_path / "cars_test" / "00001.jpg"]  # pyright: ignore
    (tmp_path / "test_list.mat").write_bytes(b"\x00" * 200)
    with pytest.raises(UserError, match=r"test_list\.mat: unreadable"):
        sets.read(Place(tmp_path), "dogs")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "猫\n\n狗\n", "empty lines"),
        ("a.json", '{"fr": ["a"]}', "no object of languages"),
        ("a.json", '{"en": 3}', "neither list nor object"),
        ("a.json", '{"en": ["a", 3]}', "no name"),
        ("a.json", '{"en": ["a"], "zh": ["a", "b"]}', "different numbers"),
        ("a.json", "{", "damaged JSON"),
        ("a.txt", b"\xff", "not UTF-8"),
    ],
)
def test_bad_names_of_classes_are_refused(tmp_path, name, content, message):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        names.read_classes(file)


def test_names_and_prompts_of_ones_own(tmp_path):
    file = tmp_path / "n.json"
    file.write_text(json.dumps({"en": {"n01": ["cat", "kitty"]}, "zh": {"n01": "猫"}}))
    assert names.read_classes(file) == {"en": {"n01": ("cat", "kitty")}, "zh": {"n01": ("猫",)}}
    prompts = tmp_path / "p.txt"
    prompts.write_text("一张{c}的照片\n")
    assert names.read_templates(prompts) == {"zh": ["一张{c}的照片"]}
    prompts.write_text("a photo\n")
    with pytest.raises(UserError, match="a prompt lacks"):
        names.read_templates(prompts)


def test_a_split_that_was_asked_for_is_there_or_refused(tmp_path):
    save(tmp_path / "a" / "x.png", "red")
    file = lines(tmp_path / "val.jsonl", {"image": "a/x.png", "label": "dog"})
    for path in (tmp_path, file, tmp_path / "*.tar"):
        with pytest.raises(UserError, match=r"--split val: .* has no such split"):
            sets.read(Place(path, "val", asked=True))
    found = sets.read(Place(tmp_path / "{split}.jsonl", "val", asked=True))
    assert isinstance(found, Labelled)
    with pytest.raises(UserError, match=r"test\.jsonl: No such file"):
        sets.read(Place(tmp_path / "{split}.jsonl", "test", asked=True))


def test_a_path_names_its_reader(tmp_path):
    save(tmp_path / "a" / "x.png", "red")
    assert isinstance(sets.read(Place(records.Path(f"folder:{tmp_path}"))), Labelled)
    with pytest.raises(UserError, match="names no data set"):
        sets.read(Place(records.Path("folder:")))


def test_language_is_told_by_most_of_the_letters():
    assert records.language_of(["一只猫", "两只 cats 和狗狗狗狗", "cat"]) == "zh"
    assert records.language_of(["cat", "猫", "dog"]) == "en"
    assert records.language_of([]) == "en"
