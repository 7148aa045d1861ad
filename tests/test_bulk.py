# SPDX-License-Identifier: Apache-2.0
"""Features of shards: those of the model, in every format, resumed after a break, on a mesh."""

import json
import shutil

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

import m2jax
from m2jax import bulk, config
from m2jax.bulk import Options, embed_shards
from m2jax.checkpoint import folder
from m2jax.cli.main import main
from m2jax.config import UserError
from m2jax.data import feature_files
from m2jax.data.build import work
from m2jax.data.build.records import Example
from m2jax.data.image import Preprocess
from m2jax.models import params as params_lib
from tests import object_server
from tests.data import own_files
from tests.data.test_shards import write_shards

MODEL = config.resolve(
    config.Model(
        name="m2-encoder-demo",
        width=16,
        heads=2,
        backbone_layers=1,
        vl_layers=1,
        out_dim=8,
        image_size=16,
        patch_size=8,
        vocab_size=100,
        max_text_len=8,
    )
)
QUIET = []


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder of a model with random weights."""
    place = tmp_path_factory.mktemp("model") / "m"
    params = jax.jit(lambda: params_lib.initialise(MODEL, jax.random.key(1)))()
    folder.write(
        place,
        MODEL,
        params,
        tokenizer=own_files.TOKENIZER.to_dict(),
        preprocess=Preprocess(16).to_dict(),
    )
    return str(place)


def embed(model, shards, out, **options):
    return embed_shards(model, shards, out, Options(**{"batch": 8, **options}), QUIET.append)


def table(file):
    """Rows by id: image features, and text features by language."""
    found = {}
    for row in pq.read_table(file).to_pylist():
        texts = dict(zip(row["language"], row["text"], strict=True))
        found[row["id"]] = np.array(row["image"]), texts
    return found


def expected(model, numbers):
    """The features by ``m2jax.load`` on one device."""
    loaded = m2jax.load(model)
    images = np.asarray(loaded.encode_image(loaded.preprocess([*map(own_files.picture, numbers)])))
    tokens = loaded.tokenize([f"东西 {n}" for n in numbers])
    return images, np.asarray(loaded.encode_text(tokens.ids, tokens.mask))


def test_features_are_the_models_on_any_mesh(model, tmp_path):
    shards = sorted(write_shards(tmp_path / "s", 21).iterdir())
    done = embed(model, shards, tmp_path / "out")
    assert done == (2, 21, 0)
    images, texts = expected(model, range(21))
    for part, shard in enumerate(shards):
        found = table(tmp_path / "out" / f"{shard.name.replace('.array_record', '')}.parquet")
        assert list(found) == [f"k{n}" for n in range(part, 21, 2)]
        for key, (image, text) in found.items():
            number = int(key[1:])
            np.testing.assert_allclose(image, images[number], atol=2e-6)
            np.testing.assert_allclose(text["zh"], texts[number], atol=2e-6)
            assert set(text) == {"en", "zh"}
    embed(model, shards, tmp_path / "split", split=2, batch=3)  # rounded up to the devices
    for file in sorted((tmp_path / "out").glob("*.parquet")):
        one, two = table(file), table(tmp_path / "split" / file.name)
        for key in one:
            np.testing.assert_allclose(one[key][0], two[key][0], atol=2e-6)


def test_tars_and_images_alone_and_unreadable_rows(model, tmp_path):
    members = [m for n in range(5) for m in own_files.sample(n)]
    members[4] = (members[4][0], b"no image")
    tar = own_files.write_tar(tmp_path / "a.b.tar", members)
    done = embed(model, [tar], tmp_path / "out", texts=False)
    assert done == (1, 4, 1)
    found = table(tmp_path / "out" / "a.b.parquet")
    assert list(found) == ["a.b#0", "a.b#1", "a.b#3", "a.b#4"]
    images, _ = expected(model, [0, 1, 3, 4])
    np.testing.assert_allclose([image for image, _ in found.values()], images, atol=2e-6)
    assert all(text == {} for _, text in found.values())
    (line,) = (tmp_path / "out" / "a.b.skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["row"] == 2
    assert "unreadable image" in json.loads(line)["why"]


def test_array_records_hold_the_same(model, tmp_path):
    shards = sorted(write_shards(tmp_path / "s", 9).iterdir())[:1]
    embed(model, shards, tmp_path / "p")
    embed(model, shards, tmp_path / "r", format="array_record")
    (file,) = (tmp_path / "r").glob("*.array_record")
    (parquet,) = (tmp_path / "p").glob("*.parquet")
    reader = work.Reader(file)
    rows = [Example.FromString(data).features.feature for data in reader.at([*range(len(reader))])]
    for fields, (key, (image, text)) in zip(rows, table(parquet).items(), strict=True):
        assert fields["id"].bytes_list.value[0].decode() == key
        np.testing.assert_array_equal(fields["image"].float_list.value, image.astype(np.float32))
        flat = np.concatenate([text["en"], text["zh"]]).astype(np.float32)
        np.testing.assert_array_equal(fields["text"].float_list.value, flat)
        assert [x.decode() for x in fields["language"].bytes_list.value] == ["en", "zh"]


def test_rows_reach_the_disk_in_groups(model, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_files, "GROUP", 4)
    shards = sorted(write_shards(tmp_path / "s", 21).iterdir())[:1]
    embed(model, shards, tmp_path / "out")
    (file,) = (tmp_path / "out").glob("*.parquet")
    found = pq.ParquetFile(file).metadata
    assert [found.row_group(i).num_rows for i in range(found.num_row_groups)] == [4, 4, 3]


def test_a_broken_run_goes_on_where_it_was(model, tmp_path, monkeypatch):
    shards = sorted(write_shards(tmp_path / "s", 30).iterdir())
    embed(model, shards, tmp_path / "whole")
    real, calls = bulk._Encoder.images, []

    def failing(self, pixels):
        calls.append(len(pixels))
        if len(calls) == 3:  # in the middle of the second shard
            raise RuntimeError("device lost")
        return real(self, pixels)

    with monkeypatch.context() as patch:
        patch.setattr(bulk._Encoder, "images", failing)
        with pytest.raises(RuntimeError, match="device lost"):
            embed(model, shards, tmp_path / "out")
    left = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert left == ["embed.json", f"{shards[0].name.replace('.array_record', '')}.parquet"]
    (tmp_path / "out" / f".{left[1]}.abc").write_text("of a killed run")
    assert embed(model, shards, tmp_path / "out") == (1, 15, 0)
    assert embed(model, shards, tmp_path / "out") == (0, 0, 0)
    for file in (tmp_path / "whole").glob("*.parquet"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


def test_another_build_or_step_is_not_taken_as_done(model, tmp_path):
    said = []

    def again(shards, name=model):
        return embed_shards(name, shards, tmp_path / "out", Options(batch=8), said.append)

    first = sorted(write_shards(tmp_path / "one", 12).iterdir())
    second = sorted(write_shards(tmp_path / "two", 12, [("another text", "en")]).iterdir())
    assert [f.name for f in first] == [f.name for f in second]
    again(first[:1])
    with pytest.raises(UserError, match="is of another shard of that name: choose another"):
        again(second)
    assert again(first) == (1, 6, 0)  # a second shard of the same build joins
    assert said[1] == "embed: 1 of 2 shards were done already"
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    assert again(sorted((tmp_path / "copy").iterdir())) == (0, 0, 0)
    assert said[-1] == "embed: 2 of 2 shards were done already"
    # A checksum of the manifest's tells shards of one size apart.
    manifest = {"shards": [{"file": first[0].name, "records": 6, "bytes": 1, "sha256": "00"}]}
    (tmp_path / "one" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="is of another shard"):
        again(first)
    (tmp_path / "one" / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"unreadable \(manifest\.json lists no shards\)"):
        again(first)


def test_another_step_of_a_run_is_refused(model, tmp_path, monkeypatch):
    shards = sorted(write_shards(tmp_path / "s", 4).iterdir())
    embed(model, shards, tmp_path / "out")
    monkeypatch.setattr(bulk.bundle_lib, "resolved", lambda path: "2000")
    with pytest.raises(UserError, match=r"holds features of .*'checkpoint': 'm'"):
        embed(model, shards, tmp_path / "out")


def test_feature_files_are_as_private_as_other_files(model, tmp_path):
    shards = sorted(write_shards(tmp_path / "s", 4).iterdir())
    embed(model, shards, tmp_path / "out")
    (tmp_path / "plain").touch()
    modes = {f.stat().st_mode for f in (*(tmp_path / "out").glob("*.parquet"), tmp_path / "plain")}
    assert len(modes) == 1


def test_shares_are_disjoint_and_all(model, tmp_path):
    shards = sorted(write_shards(tmp_path / "s", 8).iterdir())
    for index in range(2):
        done = embed(model, shards, tmp_path / "out", part=(index, 2), texts=False)
        assert done.shards == 1
    assert len(list((tmp_path / "out").glob("*.parquet"))) == 2


def test_what_does_not_fit_is_one_line(model, tmp_path):
    shards = sorted(write_shards(tmp_path / "s", 4).iterdir())
    embed(model, shards, tmp_path / "out")
    with pytest.raises(UserError, match="holds features of"):
        embed(model, shards, tmp_path / "out", texts=False)
    with pytest.raises(UserError, match="two have the same name"):
        embed(model, [shards[0], shards[0]], tmp_path / "other")
    with pytest.raises(UserError, match="--format csv: use one of parquet, array_record"):
        embed(model, shards, tmp_path / "other", format="csv")
    tar = own_files.write_tar(tmp_path / "a.tar", own_files.sample(0))
    (bad,) = [own_files.write_tar(tmp_path / "b.tar", [("0.png", b"x"), ("0.txt", b"y")])]
    with pytest.raises(UserError, match="no record could be read"):
        embed(model, [tar, bad], tmp_path / "bad")
    assert [p.name for p in (tmp_path / "bad").glob("*.parquet")] == ["a.parquet"]


@pytest.mark.slow
def test_shards_on_a_store(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("M2JAX_DATA", str(tmp_path / "home"))
    shards = sorted(write_shards(tmp_path / "s", 9).iterdir())
    tar = own_files.write_tar(
        tmp_path / "t.tar", [m for n in range(3) for m in own_files.sample(n)]
    )
    embed(model, [*shards, tar], tmp_path / "here")
    words = ["embed", "--model", model, "--batch-size", "8", "--out", str(tmp_path / "o")]
    words += ["--shards", "s3://runs/bulk/*.array_record*", "s3://runs/bulk/t.tar"]
    with object_server.serving(monkeypatch) as fs:
        for file in (*shards, tar):
            fs.pipe_file(f"runs/bulk/{file.name}", file.read_bytes())
        assert main(words) == 0
        assert "12 records of 3 shards, 0 unreadable" in capsys.readouterr().out
        assert main(words) == 0
        assert "embed: 3 of 3 shards were done already" in capsys.readouterr().err
        assert main([*words[:-1], "s3://runs/bulk/none.tar"]) == 2
        assert "matches no file: mend the address" in capsys.readouterr().err
    for file in (tmp_path / "here").glob("*.parquet"):
        assert file.read_bytes() == (tmp_path / "o" / file.name).read_bytes()
    assert len(list((tmp_path / "o").glob("*.parquet"))) == 3


def test_images_and_texts_on_all_devices(model, tmp_path):
    for number in range(5):
        own_files.picture(number).save(tmp_path / f"{number}.png")
    (tmp_path / "t.txt").write_text("".join(f"东西 {n}\n" for n in range(5)), encoding="utf-8")
    images, texts = expected(model, range(5))
    for source, features in (("--images", images), ("--texts", texts)):
        given = str(tmp_path if source == "--images" else tmp_path / "t.txt")
        words = ["embed", "--model", model, source, given, "--out", str(tmp_path / "f.npz")]
        assert main([*words, "--model-devices", "4"]) == 0
        with np.load(tmp_path / "f.npz") as written:
            np.testing.assert_allclose(written["features"], features, atol=2e-6)


def test_the_command(model, tmp_path, capsys):
    write_shards(tmp_path / "s", 6)
    words = ["embed", "--model", model, "--shards", f"{tmp_path}/s/*", "--out", str(tmp_path / "o")]
    assert main([*words, "--batch-size", "4", "--part", "2/2"]) == 0
    assert "3 records of 1 shards, 0 unreadable" in capsys.readouterr().out
    for extra, message in (
        (["--part", "3/2"], "--part 3/2: write I/N"),
        (["--part", "x"], "--part x: write I/N"),
        (["--split", "0"], "--model-devices 0: must be at least 1"),
        (["--split", "3"], "over 3 devices: this process has"),
        (["--format", "csv"], "--format csv"),
    ):
        assert main([*words[:-1], str(tmp_path / "p"), *extra]) == 2
        assert message in capsys.readouterr().err
    assert main([*words[:4], f"{tmp_path}/none*", *words[5:]]) == 2
    assert "matches no file: mend the path" in capsys.readouterr().err
