# SPDX-License-Identifier: Apache-2.0
"""``m2jax labels eval`` on tiny trees in the layouts of VOC 2007, COCO and NUS-WIDE."""

import json
from dataclasses import replace

import numpy as np
import pytest

import m2jax
from m2jax.cli.main import main
from m2jax.config import UserError
from m2jax.eval import sets
from m2jax.eval.sets import many_labels
from m2jax.eval.sets.records import Place
from m2jax.tasks.labels import evaluate, saved
from tests.eval import label_trees

SPACED = {
    "diningtable": "dining table",
    "pottedplant": "potted plant",
    "tvmonitor": "TV  Monitor",  # case and spaces do not count
}


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory):
    """Adapters: of VOC's names in reverse order with one more; of COCO's two; a residual one."""
    base = tmp_path_factory.mktemp("labels")
    voc = [f"{SPACED.get(k, k)}\t{v}" for k, v in many_labels.VOC.items()]
    files = {
        "voc": ["zebra\t斑马", *voc[::-1]],
        "coco": ["car", "person"],
        "residual": ["red", "green", "airport"],
    }
    for name, lines in files.items():
        (base / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        words = ["labels", "train", "--model", str(model), "--labels", str(base / f"{name}.txt")]
        words += ["--kind", "residual" if name == "residual" else "mlp", "--epochs", "1"]
        assert main([*words, "--sentences", "120", "--out", str(base / name)]) == 0
    return base


def evaluated(model, adapter, data, tmp_path, *extra):
    out = tmp_path / "found.json"
    words = ["labels", "eval", "--model", str(model), "--adapter", str(adapter), "--data", data]
    code = main([*words, "--json", str(out), *extra])
    return json.loads(out.read_text()) if code == 0 else code


def by_image(model, adapter, images, tmp_path):
    """Scores by title and the titles found, of ``labels predict``."""
    out = tmp_path / "predicted.json"
    words = ["labels", "predict", "--model", str(model), "--adapter", str(adapter), "--top", "99"]
    assert main([*words, "--images", str(images), "--out", str(out)]) == 0
    rows = sorted(json.loads(out.read_text()), key=lambda row: row["image"])
    return [({e["label"]: e["score"] for e in row["best"]}, set(row["labels"])) for row in rows]


def test_voc_is_scored_as_the_predictions_say(model, trained, tmp_path, capsys):
    main_lists = label_trees.voc(tmp_path)
    found = evaluated(model, trained / "voc", f"voc2007:{tmp_path}", tmp_path)
    table = capsys.readouterr().out
    name = tmp_path.name
    assert f"labels/{name}" in table
    assert f"zero_shot/{name}" in table
    rows = by_image(model, trained / "voc", main_lists.parent.parent / "JPEGImages", tmp_path)
    truth = [{"dog", "person"}, {"person"}, {"dog"}]
    dog = [row[0]["dog"] for row in rows]
    person = [row[0]["person"] for row in rows]

    def precision(scores, label):
        order = np.argsort(-np.array(scores))
        hits = np.array([label in truth[i] for i in order])
        return ((hits.cumsum() / np.arange(1, 4)) * hits).sum() / hits.sum()

    expected = (precision(dog, "dog") + precision(person, "person")) / 20
    assert found[f"labels/{name}/map"] == pytest.approx(expected, abs=1e-6)
    titles = [SPACED.get(k, k) for k in many_labels.VOC]
    taken = [row[1] & set(titles) for row in rows]
    right = sum(len(a & b) for a, b in zip(taken, truth, strict=True))
    given = sum(map(len, taken))
    assert found[f"labels/{name}/op"] == pytest.approx(right / given if given else 0)
    assert found[f"labels/{name}/or"] == pytest.approx(right / 4)
    best = [sorted(titles, key=lambda t: -row[0][t])[:3] for row in rows]
    three = sum(len(set(a) & b) for a, b in zip(best, truth, strict=True))
    assert found[f"labels/{name}/of1_top3"] == pytest.approx(2 * three / (9 + 4))
    assert found[f"baseline/chance/{name}/map"] == pytest.approx(4 / 3 / 20)


def test_coco_and_nus_wide_count_images_without_a_label(model, trained, tmp_path):
    for name in ("coco", "nus"):
        (tmp_path / name).mkdir()
        getattr(label_trees, name)(tmp_path / name)
    data = f"coco-objects:{tmp_path / 'coco'}"
    found = evaluated(model, trained / "coco", data, tmp_path, "--split", "val2014")
    assert found["baseline/chance/coco/map"] == 0.25  # one of four
    # The car stands first or second, and no image has a person.
    assert round(found["labels/coco/map"], 6) in (0.25, 0.5)
    # An adapter of cosines takes the classes that it was not trained with.
    data = f"nus-wide:{tmp_path / 'nus'}"
    found = evaluated(model, trained / "residual", data, tmp_path, "--name", "nw", "--by", "both")
    assert found["baseline/chance/nw/map"] == 0.25
    assert {"labels/nw/map", "zero_shot/nw/map"} <= set(found)
    assert "labels/nw/cf1" not in found  # thresholds are of the adapter alone


def test_a_class_that_an_adapter_lacks_or_has_for_two_is_named(model, trained, tmp_path, capsys):
    (tmp_path / "nus").mkdir()
    label_trees.nus(tmp_path / "nus")
    data = f"nus-wide:{tmp_path / 'nus'}"
    assert evaluated(model, trained / "voc", data, tmp_path) == 2
    assert "has no label 'airport' of the data set (2 of 2 are missing)" in capsys.readouterr().err
    found = saved.read(trained / "residual")
    names = ({"en": ("airport", "house pet")}, {"en": ("red",)}, {"en": ("green",)})
    merged = replace(found, vocabulary=replace(found.vocabulary, names=names))
    read = sets.read(Place(tmp_path / "nus"), "nus-wide")
    with pytest.raises(UserError, match="'house pet' is one label with another class"):
        evaluate.aligned(m2jax.load(model), merged, read)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--by", "zero-shot"], "--by zero-shot: use adapter or both"),
        (["--batch-size", "0"], "must be at least 1"),
        (["--split", "dev"], "dev"),
        (["--json", "none/x.json"], "no such folder"),
        (["--name", "a b"], "leave out / and spaces"),
        (["--data", "jsonl:none.jsonl"], "none.jsonl"),
        (["--adapter", "none"], "name a folder made by labels train"),
    ],
)
def test_bad_input_is_one_line(model, trained, tmp_path, capsys, extra, message):
    label_trees.voc(tmp_path)
    assert evaluated(model, trained / "voc", f"voc2007:{tmp_path}", tmp_path, *extra) == 2
    shown = capsys.readouterr().err.splitlines()
    assert message in shown[-1]
    assert not (tmp_path / "found.json").exists()


def test_an_adapter_of_another_model_is_refused(model, trained, tmp_path):
    label_trees.voc(tmp_path)
    found = replace(saved.read(trained / "voc"), model="other")
    data = sets.read(Place(tmp_path), "voc2007")
    with pytest.raises(UserError, match="trained on another model"):
        evaluate.score(m2jax.load(model), found, data, name="x")
