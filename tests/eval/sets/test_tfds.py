# SPDX-License-Identifier: Apache-2.0
"""TFDS data sets written by TFDS itself, read without TensorFlow."""

import contextlib
import io

import numpy as np
import pytest
import tensorflow_datasets as tfds

from m2jax.config import UserError
from m2jax.eval import sets
from m2jax.eval.sets.records import Captioned, Labelled, Place
from tests.eval.pictures import COLOURS, picture

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Toy(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    code_path = None

    def __init__(self, features=None, rows=(), **options):
        self._features, self._rows = features, rows
        super().__init__(**options)

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(self._features), description="toy"
        )

    def _split_generators(self, dl_manager):
        rows = self._rows
        return {"test": self._generate_examples(rows), "train": self._generate_examples(rows[:1])}

    def _generate_examples(self, rows):
        for number, row in enumerate(rows):
            if "image" in row:
                row["image"].seek(0)  # both splits read it
            yield number, row


def written(folder, features, rows):
    """The folder of one version of a data set, as TFDS lays it out."""
    builder = Toy(features, rows, data_dir=str(folder), file_format="array_record")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        builder.download_and_prepare()
    return next(folder.glob("*/*/dataset_info.json")).parent


IMAGE = {"image": tfds.features.Image(shape=(8, 8, 3), encoding_format="png")}


def encoded(colour):
    """Image files are taken as they are; to encode pixels TFDS would want TensorFlow."""
    out = io.BytesIO()
    picture(colour).save(out, "png")
    out.seek(0)
    return out


def test_labels_and_their_names(tmp_path):
    features = {**IMAGE, "label": tfds.features.ClassLabel(names=["warm_red", "green", "blue"])}
    rows = [{"image": encoded(c), "label": n} for n, c in enumerate(COLOURS)]
    folder = written(tmp_path, features, rows)
    found = sets.read(Place(folder))
    assert isinstance(found, Labelled)
    assert found.classes == {"en": [("warm red",), ("green",), ("blue",)]}
    shown = [found.images.read(row).getpixel((0, 0)) for row in range(3)]
    assert shown == [list(COLOURS.values())[next(iter(label))] for label in found.labels]
    assert sorted(shown) == sorted(COLOURS.values())
    names = {"zh": {"warm_red": ("红",), "green": ("绿",), "blue": ("蓝",)}}
    chinese = sets.read(Place(folder, names=names))
    assert isinstance(chinese, Labelled)
    assert set(chinese.classes) == {"en", "zh"}
    train = sets.read(Place(folder, "train"))
    assert len(train.images) == 1
    with pytest.raises(UserError, match="split 'other' cannot be read"):
        sets.read(Place(folder, "other"))


def test_several_labels_and_captions(tmp_path):
    several = tfds.features.Sequence(tfds.features.ClassLabel(names=["a", "b"]))
    rows = [{"image": encoded("red"), "labels": [0, 1]}, {"image": encoded("green"), "labels": []}]
    found = sets.read(Place(written(tmp_path / "m", {**IMAGE, "labels": several}, rows)))
    assert isinstance(found, Labelled)
    assert found.multi_label
    assert sorted(map(len, found.labels)) == [0, 2]
    said = tfds.features.Sequence({"text": tfds.features.Text()})
    rows = [{"image": encoded("red"), "captions": [{"text": "红色"}, {"text": "红"}]}]
    found = sets.read(Place(written(tmp_path / "c", {**IMAGE, "captions": said}, rows)))
    assert isinstance(found, Captioned)
    assert found.captions == {"zh": [["红色", "红"]]}


def test_what_no_suite_can_ask_about_is_refused(tmp_path):
    rows = [{"image": encoded("red")}]
    with pytest.raises(UserError, match="has none of label, labels"):
        sets.read(Place(written(tmp_path / "a", IMAGE, rows)))
    number = {"label": tfds.features.Scalar(dtype=np.int64)}
    folder = written(tmp_path / "b", {**IMAGE, **number}, [{"image": encoded("red"), "label": 3}])
    with pytest.raises(UserError, match="classes have no names"):
        sets.read(Place(folder))
    with pytest.raises(UserError, match="a label past the 2 classes"):
        sets.read(Place(folder, names={"en": [("a",), ("b",)]}))
    broken = io.BytesIO(b"no picture")
    rows = [{"image": broken, "label": 0}]
    folder = written(tmp_path / "e", {**IMAGE, **number}, rows)
    with pytest.raises(UserError, match="record 0 cannot be read"):
        sets.read(Place(folder, names={"en": [("a",), ("b",)]}))
    with pytest.raises(UserError, match="records have no field 'image'"):
        sets.read(Place(written(tmp_path / "d", number, [{"label": 3}])))


def test_a_name_that_is_not_prepared_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(UserError, match="tfds:no_such_set: split 'test' cannot be read"):
        sets.read(Place(sets.Path("tfds:no_such_set")))
