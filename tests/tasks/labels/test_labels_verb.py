# SPDX-License-Identifier: Apache-2.0
"""``m2jax labels`` from a file of labels to a page of images, on a toy model."""

import argparse
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece  # noqa: F401  (its C++ types warn when first imported inside a test)
from PIL import Image

import m2jax
from m2jax.cli import labels as cli
from m2jax.cli.main import main
from m2jax.config import UserError
from m2jax.tasks.labels import (
    features,
    grammar,
    predict,
    prompt_tuning,
    saved,
    vocabulary,
    zero_shot,
)
from m2jax.tasks.labels.adapter import SIGMA, Settings

LABELS = "red|crimson\t红\ngreen\t绿\nblue\t蓝\n"


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory):
    base = tmp_path_factory.mktemp("labels")
    (base / "labels.txt").write_text(LABELS, encoding="utf-8")
    words = ["labels", "train", "--model", str(model), "--labels", str(base / "labels.txt")]
    for kind in ("mlp", "residual"):
        assert main([*words, "--out", str(base / kind), "--kind", kind, "--epochs", "3"]) == 0
    return base


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    base = tmp_path_factory.mktemp("pictures")
    for number, colour in enumerate(["red", "green", "blue"]):
        Image.new("RGB", (20, 12), colour).save(base / f"{number} <b>.png")
    return base


def test_from_labels_to_a_page(model, trained, pictures, tmp_path, capsys):
    out, page = tmp_path / "found.json", tmp_path / "found.html"
    words = ["labels", "predict", "--model", str(model), "--adapter", str(trained / "mlp")]
    words += ["--images", str(pictures), "--out", str(out), "--html", str(page), "--top", "2"]
    assert main(words) == 0
    assert "3 images" in capsys.readouterr().out
    rows = json.loads(out.read_text())
    assert len(rows) == 3
    for row in rows:
        assert {"image", "labels", "best"} == set(row)
        assert len(row["best"]) >= 2
        assert (
            set(row["labels"])
            <= {each["label"] for each in row["best"]}
            <= {*("red", "green", "blue")}
        )
        scores = [each["score"] for each in row["best"]]
        assert scores == sorted(scores, reverse=True)
    text = page.read_text()
    assert text.count("<img") == 3
    assert "&lt;b&gt;" in text
    assert "<b>" not in text
    first = out.read_text()
    assert main(words) == 0
    assert out.read_text() == first
    assert {p.name for p in tmp_path.iterdir()} == {"found.json", "found.html"}


def test_what_was_trained_is_written_with_its_report(trained):
    found = saved.read(trained / "mlp")
    assert found.settings.normalize == "none"
    assert found.languages == ("en", "zh")
    assert found.report["sentences"] > 50
    assert found.report["train_s"] > 0
    assert set(found.report["by_language"]) == {"en", "zh"}
    assert np.isfinite(found.thresholds).all()


def test_a_residual_adapter_takes_other_labels_and_an_mlp_does_not(
    model, trained, pictures, tmp_path, capsys
):
    (tmp_path / "other.txt").write_text("yellow\nblue\n", encoding="utf-8")
    words = ["labels", "predict", "--model", str(model), "--images", str(pictures)]
    words += ["--labels", str(tmp_path / "other.txt"), "--out", str(tmp_path / "a.json")]
    assert main([*words, "--adapter", str(trained / "residual")]) == 0
    rows = json.loads((tmp_path / "a.json").read_text())
    assert {each["label"] for each in rows[0]["best"]} == {"yellow", "blue"}
    capsys.readouterr()
    assert main([*words, "--adapter", str(trained / "mlp")]) == 2
    assert "knows its own labels alone" in capsys.readouterr().err


def test_features_keep_their_length_where_asked_and_adapters_know_their_model(model, trained):
    bundle = m2jax.load(model)
    texts = ["a picture of red", "绿的图片", "blue"]
    plain = features.texts(bundle, texts, length=False)
    long = features.texts(bundle, texts, length=True)
    np.testing.assert_allclose(np.linalg.norm(plain, axis=1), 1, rtol=1e-5)
    norms = np.linalg.norm(long, axis=1, keepdims=True)
    np.testing.assert_allclose(long / norms, plain, atol=1e-5)
    assert np.abs(norms - 1).max() > 0.01
    pixels = np.random.default_rng(0).random((2, 16, 16, 3), np.float32)
    by_bundle = np.asarray(bundle.encode_image(pixels))
    by_length = np.asarray(features._LongImages(bundle).encode_image(pixels))
    by_length = by_length / np.linalg.norm(by_length, axis=1, keepdims=True)
    np.testing.assert_allclose(by_length, by_bundle, atol=1e-5)
    predict.check_model(bundle, saved.read(trained / "mlp"))
    scale = {**bundle.params, "logit_scale": bundle.params["logit_scale"] + 1}
    other = type(bundle)(bundle.config, bundle.graph, scale, bundle.tokenizer, bundle.preprocessing)
    with pytest.raises(UserError, match="trained on another model"):
        predict.check_model(other, saved.read(trained / "mlp"))


def test_class_prompts_are_the_same_in_chunks(model):
    bundle = m2jax.load(model)
    words = vocabulary.checked([{"en": ["red", "crimson"]}, {"en": ["green"]}, {"en": ["blue"]}])
    whole = zero_shot.class_prompts(bundle, words, ("en",))
    parts = zero_shot.class_prompts(bundle, words, ("en",), chunk=1)
    np.testing.assert_allclose(parts, whole, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, rtol=1e-5)
    both = zero_shot.together(np.array([[0.0, 4.0]]), np.array([[-1.0, 1.0]]))
    np.testing.assert_allclose(both, [[0, 1]])


@pytest.mark.parametrize(
    ("content", "extra", "message"),
    [
        ("", [], "holds no label"),
        ("dog\ndog\n", [], "is a name of line 1 too"),
        ("dog\n狗\n", [], "means 'dog'"),
        ("hot dog\nhot-dog\n", [], "--labels labels.txt: hot dog and hot-dog differ in spaces or"),
        ("red\nblue\n", ["--languages", "zh"], "'red' has no name in it"),
        ("red\nblue\n", ["--languages", "fr"], "use en or zh"),
        ("red\n蓝\n", [], "none common"),
        ("red\nblue\n", ["--loss", "x"], "use one of ranking"),
        ("red\nblue\n", ["--sentences", "1"], "--sentences 1: must be at least 2"),
        ("red\nblue\n", ["--llm", "file:///x", "--llm-model", "m", "--corpus", "c"], "no http"),
        ("red\nblue\n", ["--llm", "http://x"], "name the model with --llm-model"),
        ("red\nblue\n", ["--corpus", "c"], "name it with --llm"),
        ("red\n" + "a long name " * 30 + "\n", [], "longer than the model's text (32 tokens)"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    model, tmp_path, capsys, monkeypatch, content, extra, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "labels.txt").write_text(content, encoding="utf-8")
    words = ["labels", "train", "--model", str(model), "--labels", "labels.txt", "--out", "out"]
    assert main([*words, *extra]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1
    assert {p.name for p in tmp_path.iterdir()} == {"labels.txt"}


def test_bad_input_of_predict(model, trained, pictures, tmp_path, capsys):
    (tmp_path / "no.png").write_bytes(b"no image")
    words = ["labels", "predict", "--model", str(model), "--adapter", str(trained / "mlp")]
    words += ["--out", str(tmp_path / "x.json")]
    for extra, message in (
        (["--images", str(tmp_path / "no.png")], "unreadable image"),
        (["--images", str(tmp_path / "none")], "no such file"),
        (["--images", str(pictures), "--top", "0"], "--top 0: must be at least 1"),
        (["--images", str(pictures), "--html", str(tmp_path / "a" / "b.html")], "no such folder"),
        (["--images", str(pictures), "--html", str(tmp_path / "x.json")], "is --out too"),
    ):
        assert main([*words, *extra]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()


def test_a_context_of_no_tokens_is_the_model_as_it_reads_names(model):
    bundle = m2jax.load(model)
    names = ["red", "a bright green", "蓝"]
    tokens = bundle.tokenize(names)
    classes = jnp.asarray(tokens.ids), jnp.asarray(tokens.mask)
    of = jax.jit(prompt_tuning._class_features, static_argnums=0)
    found = of(bundle.graph, bundle.params, classes, jnp.zeros((2, 0, 16)))
    expected = features.texts(bundle, names, length=False)
    np.testing.assert_allclose(found.whole, expected, atol=1e-5)
    np.testing.assert_allclose(found.each, expected, atol=1e-5)


@pytest.mark.slow
def test_learned_contexts_fit_the_sentences_and_padding_does_not_matter(model):
    bundle = m2jax.load(model)
    words = vocabulary.checked([{"en": ["red"]}, {"en": ["green"]}, {"en": ["blue"]}])
    made = grammar.sentences(words, ("en",), 40, seed=0)
    texts, labels = [s.text for s in made], [s.labels for s in made]
    recipe = prompt_tuning.Recipe(context=4, steps=3, batch=16)
    prompts = prompt_tuning.train(bundle, words, "en", texts, labels, recipe)
    np.testing.assert_allclose(np.linalg.norm(prompts.whole, axis=1), 1, rtol=1e-5)
    assert np.abs(np.asarray(prompts.whole) - np.asarray(prompts.each)).max() > 1e-3
    pixels = np.random.default_rng(0).random((3, 16, 16, 3), np.float32)
    assert prompt_tuning.scores(bundle, pixels, prompts, batch=2).shape == (3, 3)
    rng = np.random.default_rng(1)
    each = rng.normal(size=(2, 5, 8)).astype(np.float32)
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool)
    whole = np.zeros((2, 8), np.float32)
    local = prompt_tuning.aggregate(prompt_tuning.Tokens(whole, each, mask), prompts, 50.0)[1]
    short = prompt_tuning.Tokens(whole[:1], each[:1, :3], mask[:1, :3])
    np.testing.assert_allclose(
        local[:1], prompt_tuning.aggregate(short, prompts, 50.0)[1], rtol=1e-5
    )
    with pytest.raises(UserError, match="fit: use fewer"):
        prompt_tuning.train(
            bundle, words, "en", texts, labels, prompt_tuning.Recipe(context=32, steps=1)
        )


def test_the_verbs_defaults_are_those_of_the_settings(trained, capsys):
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers())
    words = ["labels", "train", "--model", "m", "--labels", "l", "--out", "o"]
    given = vars(parser.parse_args(words))
    for name in ("kind", "noise", "loss", "epochs", "seed"):
        assert given[name] == getattr(Settings(), name), name
    assert Settings().sigma == SIGMA[Settings().kind]
    for kind, sigma in SIGMA.items():
        assert saved.read(trained / kind).settings.sigma == sigma
    with pytest.raises(SystemExit):  # the help names the sizes of both kinds
        parser.parse_args(["labels", "train", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert f"mlp: {SIGMA['mlp']}, residual: {SIGMA['residual']}" in said
