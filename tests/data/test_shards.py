# SPDX-License-Identifier: Apache-2.0
"""Built shards and TFDS data sets as training data, and all sources in a Grain pipeline."""

import pickle
import subprocess
import sys

import grain
import numpy as np
import pytest
import tensorflow_datasets as tfds

from m2jax import config
from m2jax.config import UserError
from m2jax.data import tfds_pairs
from m2jax.data.build import manifest, pipeline, shards, work
from m2jax.data.build.plan import Duplicates, Plan
from m2jax.data.build.readers.base import Source
from m2jax.data.build.records import Caption, Example, Record, encode
from m2jax.data.files import pair_batches
from m2jax.data.grain_source import GrainPairs
from m2jax.data.shards import ShardPairs
from m2jax.data.tars import TarPairs
from m2jax.data.tfds_pairs import TfdsPairs
from m2jax.data.tsv import TsvPairs
from tests.data import own_files
from tests.data.build import collections_of as made


def write_shards(folder, count, captions=None):
    """Two shards of records whose pictures tell their number."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in range(2):
        with work.records(folder / shards.file_name(part, 2)) as out:
            for number in range(part, count, 2):
                texts = captions or [(f"thing {number}", "en"), (f"东西 {number}", "zh")]
                found = tuple(Caption(text, language) for text, language in texts)
                image = own_files.encoded(number)
                out.write(encode(Record(f"k{number}", image, found, "s", "CC0")))
    return folder


def experiment(**data):
    cfg = config.Data(batch_size=8, **data)
    model = config.Model(image_size=16, max_text_len=8)
    return config.Experiment(data=cfg, model=model)


def test_a_build_is_training_data(tmp_path):
    """From tars to batches, through the build and the run's own config."""
    web = Source("web", "tars", made.tars(tmp_path / "web", range(12)))
    plan = Plan(tmp_path / "out", (web,), duplicates=Duplicates(near="none"), shard_records=5)
    pipeline.build(plan, say=lambda line: None)
    (tmp_path / "t.model").write_bytes(own_files.train_tokenizer(["animal house 动物"] * 30, 60))
    run = experiment(
        name="shards", files=(str(tmp_path / "out"),), tokenizer=str(tmp_path / "t.model")
    )
    batch = pair_batches(run, None).batch(0, slice(0, 8))
    assert batch["image"].shape == (8, 1, 16, 16, 4)
    assert batch["text_mask"].any(axis=-1).all()
    (one, two) = manifest.read(tmp_path / "out")["shards"]
    by_file = experiment(
        name="shards",
        files=(str(tmp_path / "out" / "m2jax_pairs*"),),
        tokenizer=str(tmp_path / "t.model"),
    )
    again = pair_batches(by_file, None).batch(0, slice(0, 8))
    np.testing.assert_array_equal(again["image"], batch["image"])
    assert len(ShardPairs([tmp_path / "out" / one["file"]])) == one["records"]
    file = tmp_path / "out" / two["file"]
    file.write_bytes(file.read_bytes()[:-65536])
    with pytest.raises(UserError, match="unreadable shards"):
        pair_batches(run, None)
    with work.records(file):
        pass
    with pytest.raises(UserError, match=f"{one['records']} records where the manifest has 12"):
        pair_batches(run, None)


def test_pictures_and_texts_of_a_record_belong_together(tmp_path):
    source = own_files.batches({"own": ShardPairs([write_shards(tmp_path, 20)])})
    seen = set()
    for index in range(3):
        batch = source.batch(index, slice(0, 8))
        for row in range(8):
            number = own_files.number_of(batch["image"][row])
            seen.add(number)
            expected = own_files.TOKENIZER([f"thing {number}", f"东西 {number}"])
            np.testing.assert_array_equal(batch["text"][row], expected.ids)
    assert seen == set(range(20))


def test_training_needs_none_of_the_builds_libraries():
    code = "import sys, m2jax.data.files, m2jax.bulk\n"
    code += "print(sorted({'apache_beam', 'lmdb', 'opencc', 'py3langid'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr


def test_of_several_captions_one_is_drawn(tmp_path):
    english = ("1 thing", "2 thing", "3 thing")
    texts = [*((text, "en") for text in english), ("", "zh"), ("东西 1", "zh")]
    pairs = ShardPairs([write_shards(tmp_path, 8, texts)])
    assert pairs.read(0).texts == {"en": english, "zh": ("东西 1",)}
    source = own_files.batches({"own": pairs})
    drawn = np.concatenate([source.batch(i, slice(0, 8))["text"][:, 0] for i in range(30)])
    ids = own_files.TOKENIZER(english).ids
    counts = [(drawn == row).all(axis=1).sum() for row in ids]
    assert sum(counts) == 240
    assert min(counts) > 50  # of 80 each on average: 4 deviations
    again = own_files.batches({"own": pairs}).batch(7, slice(2, 5))
    np.testing.assert_array_equal(again["text"], source.batch(7, slice(2, 5))["text"])


def test_damaged_shards_are_one_line(tmp_path):
    with pytest.raises(UserError, match="holds no ArrayRecord files"):
        ShardPairs([tmp_path])
    folder = write_shards(tmp_path / "s", 6)
    (file, other) = sorted(folder.iterdir())
    file.write_bytes(b"")
    with pytest.raises(UserError, match="missing or empty"):
        ShardPairs([folder])
    with work.records(file) as out:
        out.write(b"no example")
    with pytest.raises(UserError, match="record 0: no record of built shards"):
        ShardPairs([file]).read(0)
    data = bytearray(other.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    other.write_bytes(data)
    with pytest.raises(UserError, match=r"unreadable|no record"):
        ShardPairs([other]).read(0)


FEATURES = {
    "image": tfds.features.Image(shape=(None, None, 3)),
    "captions": tfds.features.Sequence(tfds.features.Text()),
    "caption_zh": tfds.features.Text(),
    "label": tfds.features.ClassLabel(names=["small_cat", "dog"]),
    "image_id": tfds.features.Text(),
}


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    """A data set as others make them: an image, captions in two languages, a label."""
    folder = tmp_path_factory.mktemp("tfds")
    features = tfds.features.FeaturesDict(FEATURES)
    splits = []
    for split, count in (("train", 10), ("test", 3)):
        with work.records(folder / f"pets-{split}.array_record-00000-of-00001") as out:
            for number in range(count):
                example = Example()  # as TFDS writes it; its own encoder needs TensorFlow
                fields = example.features.feature
                fields["image"].bytes_list.value.append(own_files.encoded(number))
                texts = {"captions": [f"thing {number}", " "], "caption_zh": [f"东西 {number}"]}
                for name, said in {**texts, "image_id": [f"id{number}"]}.items():
                    fields[name].bytes_list.value.extend(text.encode() for text in said)
                fields["label"].int64_list.value.append(number % 2)
                out.write(example.SerializeToString())
        template = tfds.core.ShardedFileTemplate(
            data_dir=str(folder), dataset_name="pets", split=split, filetype_suffix="array_record"
        )
        splits.append(
            tfds.core.SplitInfo(
                name=split, shard_lengths=[count], num_bytes=9, filename_template=template
            )
        )
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=features,
        split_infos=splits,
        version="1.0.0",
        filename_template=template,
        check_data=False,
    )
    return folder


def test_a_tfds_data_set_is_training_data(data_set, tmp_path):
    pairs = TfdsPairs([data_set], "train", language="en")
    found = sorted(pairs.read(row).texts["zh"][0] for row in range(len(pairs)))
    assert found == sorted(f"东西 {n}" for n in range(10))
    for row in range(10):
        image, texts = pairs.read(row)
        number = int(texts["zh"][0].split()[1])
        assert own_files.number_of(np.asarray(image)) == number
        assert set(texts["en"]) == {f"thing {number}", ("small cat", "dog")[number % 2]}
    assert len(TfdsPairs([data_set], "test[:2]", language="en")) == 2
    (tmp_path / "t.model").write_bytes(own_files.train_tokenizer(["thing 东西"] * 30, 40))
    run = experiment(name="tfds", files=(str(data_set),), tokenizer=str(tmp_path / "t.model"))
    assert pair_batches(run, None).batch(0, slice(0, 8))["image"].shape == (8, 1, 16, 16, 4)
    copy = pickle.loads(pickle.dumps(pairs))  # as worker processes get it
    assert copy.read(3).texts == pairs.read(3).texts


def test_what_is_no_such_data_set_is_one_line(data_set, tmp_path):
    for folder, split in ((tmp_path, "train"), (data_set, "validation")):
        with pytest.raises(UserError, match=r"no TFDS data set .* with split"):
            TfdsPairs([folder], split, language="en")
    with pytest.raises(UserError, match="a TFDS source is one"):
        TfdsPairs([data_set, data_set], "train", language="en")
    run = experiment(name="mixture", mixture=(config.Part(kind="zip", files=(str(tmp_path),)),))
    with pytest.raises(UserError, match=r"data\.tokenizer|no such kind"):
        pair_batches(run, None)


def test_every_source_goes_into_a_grain_pipeline(data_set, tmp_path):
    tar = own_files.write_tar(
        tmp_path / "a.tar", [m for n in range(10) for m in own_files.sample(n)]
    )
    sources = (
        ShardPairs([write_shards(tmp_path / "s", 10)]),
        TfdsPairs([data_set], "train", language="en"),
        TarPairs([tar], tmp_path / "cache", language="en"),
        TsvPairs(own_files.write_tsv(tmp_path / "tsv", 10)),
    )
    for pairs in sources:
        data = grain.MapDataset.source(GrainPairs(pairs)).shuffle(seed=1).repeat(2)
        rows = [data[i] for i in range(20)]
        numbers = [own_files.number_of(row["image"]) for row in rows]
        assert sorted(numbers) == sorted([*range(10)] * 2)
        assert numbers[:10] != list(range(10))
        assert all(
            row["texts"]["zh"] == (f"东西 {n}",) for row, n in zip(rows, numbers, strict=True)
        )
        assert rows[0]["image"].shape == (24, 20, 3)
        assert "10 rows" in repr(GrainPairs(pairs))


def test_an_unknown_label_is_no_text():
    assert tfds_pairs._strings(np.array([-1, 1]), ("small cat", "dog")) == ["dog"]
    assert tfds_pairs._strings(np.int64(-1), ("small cat", "dog")) == []
