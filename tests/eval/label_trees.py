# SPDX-License-Identifier: Apache-2.0
"""VOC 2007, NUS-WIDE and COCO 2014 as tiny trees in the layouts of their releases."""

import json

from PIL import Image

from m2jax.eval.sets import many_labels

COLOURS = ("red", "green", "blue")


def voc(root):
    """Three images: a dog with a person, a person, a dog marked difficult. Gives ImageSets/Main."""
    main = root / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main"
    images = main.parent.parent / "JPEGImages"
    for folder in (main, images):
        folder.mkdir(parents=True)
    numbers = ("000001", "000002", "000004")
    (main / "test.txt").write_text("".join(f"{n}\n" for n in numbers))
    for kind in many_labels.VOC:
        marks = {"dog": ("1", "-1", "0"), "person": ("1", "1", "-1")}.get(kind, ("-1",) * 3)
        rows = zip(numbers, marks, strict=True)
        (main / f"{kind}_test.txt").write_text("".join(f"{n} {m:>2}\n" for n, m in rows))
    for number, colour in zip(numbers, COLOURS, strict=True):
        Image.new("RGB", (4, 3), colour).save(images / f"{number}.jpg")
    return main


def nus(root):
    """Two images of two concepts; the first shows none."""
    truth = root / "Groundtruth" / "TrainTestLabels"
    for folder in (truth, root / "ImageList", root / "Flickr" / "actor"):
        folder.mkdir(parents=True)
    (root / "Concepts81.txt").write_text("airport\nhouse_pet\n")
    listed = "actor\\0001_2.jpg\nactor\\0002_3.jpg\n"
    (root / "ImageList" / "TestImagelist.txt").write_text(listed)
    (truth / "Labels_airport_Test.txt").write_text("0\n0\n")
    (truth / "Labels_house_pet_Test.txt").write_text("0\n1\n")
    for name, colour in (("0001_2", "red"), ("0002_3", "green")):
        Image.new("RGB", (5, 2), colour).save(root / "Flickr" / "actor" / f"{name}.jpg")


def coco(root):
    """Two images of val2014 and two kinds; the first image shows none."""
    content = {
        "categories": [{"id": 1, "name": "person"}, {"id": 3, "name": "car"}],
        "images": [{"id": i, "file_name": f"COCO_val2014_{i:012}.jpg"} for i in (5, 6)],
        "annotations": [{"image_id": 6, "category_id": 3}],
    }
    for name in ("annotations", "val2014"):
        (root / name).mkdir()
    (root / "annotations" / "instances_val2014.json").write_text(json.dumps(content))
    for row, colour in zip(content["images"], COLOURS, strict=False):
        Image.new("RGB", (6, 6), colour).save(root / "val2014" / row["file_name"])
