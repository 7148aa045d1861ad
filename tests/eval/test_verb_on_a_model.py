# SPDX-License-Identifier: Apache-2.0
"""``m2jax eval`` and ``m2jax compare`` from a model folder and files to figures, all of it real."""

import json

import jax
import numpy as np
import pytest
import sentencepiece  # noqa: F401  (its C++ types warn when first imported inside a test)
from PIL import Image

from m2jax.checkpoint import folder
from m2jax.cli.main import main
from m2jax.config import Model, resolve
from m2jax.data.image import Preprocess
from m2jax.data.text import SentencePieceTokenizer, train_tokenizer
from m2jax.dist.mesh import local_mesh
from m2jax.eval import compare, features, runner, sets, suites
from m2jax.eval.sets.records import Place
from m2jax.models import params as params_lib
from tests import object_server
from tests.data import own_files
from tests.eval.pictures import COLOURS, save

MODEL = resolve(
    Model(
        **{"width": 16, "heads": 2, "out_dim": 8, "vocab_size": 100, "text_positions": 16},
        **{"image_size": 16, "max_text_len": 8, "dtype": "float32", "init": "scaled"},
    )
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Random weights: what is shown is that files become figures, not that it knows colours."""
    words = [f"{colour} thing {i}" for colour in COLOURS for i in range(20)]
    tokenizer = SentencePieceTokenizer(train_tokenizer(words, 60), 8)
    params = jax.jit(lambda: params_lib.initialise(MODEL, jax.random.key(0)))()
    path = tmp_path_factory.mktemp("models") / "toy"
    preprocess = Preprocess(16).to_dict()
    folder.write(path, MODEL, params, tokenizer=tokenizer.to_dict(), preprocess=preprocess)
    return path


def test_from_files_to_figures_and_their_comparison(model, tmp_path, capsys):
    rows = []
    for number in range(12):
        colour = list(COLOURS)[number % 3]
        save(tmp_path / "images" / f"{number}.png", colour)
        captions = [f"{colour} thing {number}", f"{colour} {number}"]
        rows.append({"image": f"images/{number}.png", "caption": captions})
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    scores, table = tmp_path / "a.json", tmp_path / "a.md"
    words = ["eval", "--model", str(model), "--suite", "retrieval", "--data", str(data)]
    assert main([*words, "--json", str(scores), "--markdown", str(table)]) == 0
    assert "retrieval/pairs/en/standard" in capsys.readouterr().out
    found = compare.read(scores)
    for protocol in ("standard", "m2_release", "one_caption"):
        stem = f"retrieval/pairs/en/{protocol}"
        values = [found.metrics[f"{stem}/{way}_r{k}"] for way in ("i2t", "t2i") for k in (1, 5, 10)]
        np.testing.assert_allclose(found.metrics[f"{stem}/mean_recall"], np.mean(values))
        examples = found.examples[f"{stem}/mean_recall"]
        assert len(examples) == 12
    assert "| retrieval/pairs/en/one_caption |" in table.read_text()
    assert main(["compare", str(scores), str(scores)]) == 0
    assert "could be chance" in capsys.readouterr().out
    again = tmp_path / "b.json"
    assert main([*words, "--json", str(again)]) == 0
    assert again.read_text() == scores.read_text()


def labelled(folder, count):
    """A folder per class of pictures that a model with random weights tells apart somehow."""
    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / list(COLOURS)[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(path)


@pytest.mark.parametrize("split", [1, 2])
def test_the_devices_share_each_batch_and_the_figures_stay(model, tmp_path, split):
    labelled(tmp_path / "d", 29)
    place = Place(tmp_path / "d")
    data = sets.read(place, "folder")
    alone, shared = (runner.opened(model, mesh=mesh)[0] for mesh in (None, local_mesh(split)))
    found = {}
    for bundle in (alone, shared):
        images = features.image_features(bundle, data.images, batch=13)  # 8 devices: 16
        texts, _ = features.unique_text_features(bundle, list(COLOURS), batch=5)
        score = suites.score(bundle, "zero-shot", suites.Request("d", place, languages=["en"]))
        found[bundle is shared] = images, texts, score.figures["zero_shot/d/en/top1"].share
    for one, other in zip(found[False][:2], found[True][:2], strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)
    assert found[False][2] == found[True][2]
    assert 0 < found[True][2].value < 1
    kernel = shared.params["image_head"]["kernel"]
    assert len(kernel.sharding.device_set) == 8


@pytest.mark.slow
def test_data_sets_on_a_store(model, tmp_path, monkeypatch, capsys):
    """A folder, tars, and lines with their pictures, each named by its address."""
    monkeypatch.setenv("M2JAX_DATA", str(tmp_path / "home"))
    labelled(tmp_path / "d", 12)
    files = [path for path in sorted(tmp_path.glob("d/*/*.png"))]
    rows = [
        {"image": path.relative_to(tmp_path).as_posix(), "caption": f"{path.parent.name} {n}"}
        for n, path in enumerate(files)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    members = [
        member
        for n, path in enumerate(files)
        for member in ((f"{n}.png", path.read_bytes()), (f"{n}.txt", f"thing {n}".encode()))
    ]
    own_files.write_tar(tmp_path / "0.tar", members)
    words = ["eval", "--model", str(model), "--languages", "en", "--json", str(tmp_path / "a.json")]
    with object_server.serving(monkeypatch) as fs:
        for path in (*files, tmp_path / "pairs.jsonl", tmp_path / "0.tar"):
            fs.pipe_file(f"runs/set/{path.relative_to(tmp_path).as_posix()}", path.read_bytes())
        for suite, data, more, figure in (
            ("zero-shot", "folder:s3://runs/set/d", [], "zero_shot/d/en/top1"),
            ("retrieval", "s3://runs/set/0.tar", [], "retrieval/0/en/standard/i2t_r1"),
            (
                *("retrieval", "s3://runs/set/pairs.jsonl", ["--images", "s3://runs/set"]),
                "retrieval/pairs/en/standard/i2t_r1",
            ),
        ):
            assert main([*words, "--suite", suite, "--data", data, *more]) == 0
            there = compare.read(tmp_path / "a.json").metrics
            local = data.replace("s3://runs/set", str(tmp_path))
            assert main([*words, "--suite", suite, "--data", local]) == 0
            assert compare.read(tmp_path / "a.json").metrics == there
            assert figure in there
        capsys.readouterr()
        for data, message in (
            ("s3://runs/none.tar", "matches no file: mend the address"),
            ("s3://runs/set/*", "names 3 files: name the folder"),
            ("s3://runs/{split}.tar", "{split} stands in local paths alone"),
        ):
            assert main([*words, "--suite", "retrieval", "--data", data]) == 2
            shown = capsys.readouterr().err
            assert message in shown
            assert shown.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--suite", "retrieval"], "with --data [READER:]PATH"),
        (["--suite", "retrieval", "--data", "nowhere.jsonl"], "No such file"),
        (["--model-devices", "0"], "--model-devices 0: must be at least 1"),
        (
            ["--suite", "retrieval", "--data", "x.jsonl", "--model-devices", "3"],
            "this process has 8: use a number",
        ),
        (["--suite", "nothing"], "no such suite: use one of cars"),
        (["--suite", "zero-shot", "--data", "x", "--templates", "none.txt"], "No such file"),
    ],
)
def test_what_cannot_be_scored_is_one_line_and_exit_code_2(model, words, message, capsys):
    assert main(["eval", "--model", str(model), *words]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1
