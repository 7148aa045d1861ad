# SPDX-License-Identifier: Apache-2.0
"""``m2jax eval`` and ``m2jax compare`` from a model folder and files to figures, all of it real."""

import json

import jax
import numpy as np
import pytest
import sentencepiece  # noqa: F401  (its C++ types warn when first imported inside a test)

from m2jax.checkpoint import folder
from m2jax.cli.main import main
from m2jax.config import Model, resolve
from m2jax.data.image import Preprocess
from m2jax.data.text import SentencePieceTokenizer, train_tokenizer
from m2jax.eval import compare
from m2jax.models import params as params_lib
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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--suite", "retrieval"], "name it with --data"),
        (["--suite", "retrieval", "--data", "nowhere.jsonl"], "No such file"),
        (["--suite", "nothing"], "no such suite: use one of cars"),
        (["--suite", "zero-shot", "--data", "x", "--templates", "none.txt"], "No such file"),
    ],
)
def test_what_cannot_be_scored_is_one_line_and_exit_code_2(model, words, message, capsys):
    assert main(["eval", "--model", str(model), *words]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1
