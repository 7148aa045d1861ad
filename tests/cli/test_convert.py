# SPDX-License-Identifier: Apache-2.0
"""``m2jax convert``: what is printed, which exit code, and bad input in one line."""

import json

import jax
import numpy as np
import pytest

from m2jax.checkpoint.convert.m2_names import Slot
from m2jax.cli.main import main
from m2jax.data.text import SentencePieceTokenizer, train_tokenizer
from tests.checkpoint.convert import m2_files, torch_files


@pytest.fixture
def release(tmp_path):
    return m2_files.release(tmp_path / "release", m2_files.tensors())


def words(release, dst, *more):
    file, arch = release
    return ["convert", "import", str(file), str(dst), "--arch", str(arch), *more]


@pytest.mark.slow
def test_import_and_export(tmp_path, release, capsys):
    assert main(words(release, tmp_path / "model")) == 0
    shown = capsys.readouterr().out
    assert "layout bare, parameters float32, 145 tensors" in shown
    assert "no tokenizer: texts must come as ids" in shown
    assert shown.count(" ok\n") == 8
    assert shown.endswith(f"{tmp_path / 'model'}\n")
    out = tmp_path / "out"
    assert (
        main(["convert", "export", str(tmp_path / "model"), str(out), "--format", "m2-torch"]) == 0
    )
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    assert main(words(release, tmp_path / "fast", "--no-check", "--dtype", "bfloat16")) == 0
    shown = capsys.readouterr().out
    assert "parameters bfloat16" in shown
    assert "not checked" in shown


def test_a_failed_check_exits_with_4(tmp_path, release, monkeypatch, capsys):
    monkeypatch.setattr(
        Slot, "inward", lambda slot, tensor: tensor if slot.turn == "" else _mirrored(slot, tensor)
    )
    assert main(words(release, tmp_path / "model")) == 4
    shown = capsys.readouterr()
    assert "FAIL" in shown.out
    assert shown.err.count("\n") == 1
    assert "the check failed" in shown.err
    assert not (tmp_path / "model").exists()


def _mirrored(slot, tensor):
    """Matrices upside down, all else as it should be."""
    turned = {"T": tensor.T, "flat": tensor.reshape(-1)}
    return turned[slot.turn][::-1] if slot.turn in turned else tensor.transpose(2, 3, 1, 0)


def test_names_may_be_allowed_one_by_one(tmp_path, capsys):
    tensors = m2_files.tensors() | {"extra.a": np.zeros(1, np.float32)}
    del tensors["norm.bias"]
    release = m2_files.release(tmp_path / "release", tensors)
    assert main(words(release, tmp_path / "model", "--no-check")) == 2
    error = capsys.readouterr().err
    assert "1 missing (norm.bias) and 1 left over (extra.a)" in error
    assert error.count("\n") == 1
    allowed = ["--allow-missing", "norm.bias", "--allow-missing", "extra.*"]
    assert main(words(release, tmp_path / "model", "--no-check", *allowed)) == 0
    shown = capsys.readouterr().out
    assert "left out 1: extra.a" in shown
    assert "initial values for 1: norm.bias" in shown


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--arch", "m2-encoder-2b"], "no such architecture"),
        (["--arch", "bert"], "no such architecture"),
        (["--arch", "m2-encoder-0.4b"], "name the right --arch"),
        (["--arch", "none.json"], "No such file"),
        (["--tokenizer", "none"], "sp.model: No such file"),
    ],
)
def test_bad_arguments(tmp_path, release, change, message, capsys):
    assert main(words(release, tmp_path / "model", *change)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "model").exists()


def test_a_pickle_with_code_is_bad_input(tmp_path, release, capsys):
    file = tmp_path / "m.ckpt"
    torch_files.save(file, {"state_dict": {}, "fn": jax.tree.map})
    assert main(words((file, release[1]), tmp_path / "model")) == 2
    assert "which is no tensor" in capsys.readouterr().err


def test_wrong_usage(capsys):
    for line in (["convert"], ["convert", "import", "a"], ["convert", "export", "a", "b"]):
        with pytest.raises(SystemExit) as end:
            main(line)
        assert end.value.code == 2
    assert main(["convert", "export", "none", "out", "--format", "m2-torch"]) == 2
    assert "no such directory" in capsys.readouterr().err


def test_names_of_a_hostile_file_are_shown_as_text(tmp_path, capsys):
    tensors = m2_files.tensors() | {"a\x1b[31m\nb": np.zeros(1, np.float32)}
    release = m2_files.release(tmp_path / "release", tensors)
    assert main(words(release, tmp_path / "model")) == 2
    error = capsys.readouterr().err
    assert "left over (a\\x1b[31m\\nb)" in error
    assert error.count("\n") == 1
    assert main(words(release, tmp_path / "model", "--no-check", "--allow-missing", "*")) == 0
    assert "left out 1: a\\x1b[31m\\nb\n" in capsys.readouterr().out


def test_a_damaged_config_is_told_from_none(tmp_path, release, capsys):
    line = ["convert", "import", str(release[0]), str(tmp_path / "model")]
    assert main(line) == 2
    assert "no config file beside the weights" in capsys.readouterr().err
    (release[0].parent / "config.json").write_text('{"encoder_embed_dim": 16,')
    assert main(line) == 2
    assert "config.json: not JSON" in capsys.readouterr().err


def test_export_asks_before_it_loads(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("m2jax.bundle.load", lambda path: pytest.fail("loaded in vain"))
    assert main(["convert", "export", "model", str(tmp_path / "out"), "--format", "onnx"]) == 2
    assert "no such format" in capsys.readouterr().err
    assert main(["convert", "export", "model", str(tmp_path), "--format", "hf"]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("preprocessor_config.json", '{"m2jax": {"size": 1000000000}}', "none of a model of"),
        ("preprocessor_config.json", '{"m2jax": {"size": %d, "cut": "x"}}', "none of a model of"),
        ("preprocessor_config.json", '{"m2jax": {"size": %d, "surprise": 1}}', "none of a model"),
        ("m2jax_tokenizer.json", '{"kind": ["glm"]}', "is unknown"),
        ("m2jax_tokenizer.json", "[" * 200_000, "not JSON"),
        ("m2jax_tokenizer.json", '{"kind": "glm", "model": "", "max_len": 9}', "it is empty"),
        ("m2jax_tokenizer.json", '{"kind": "glm", "model": "", "max_len": 1e12}', "damaged"),
    ],
)
def test_hostile_files_beside_the_weights(tmp_path, release, name, text, match, capsys):
    text = text.replace("%d", str(m2_files.MODEL.image_size))
    (release[0].parent / name).write_text(text)
    assert main(words(release, tmp_path / "model")) == 2
    error = capsys.readouterr().err
    assert match in error
    assert error.count("\n") == 1
    assert not (tmp_path / "model").exists()


def test_a_tokenizer_of_our_export_must_fit(tmp_path, release, capsys):
    made = SentencePieceTokenizer(train_tokenizer([chr(0x4E00 + i) for i in range(300)], 310), 6)
    assert made.vocab_size > m2_files.MODEL.vocab_size
    file = release[0].parent / "m2jax_tokenizer.json"
    file.write_text(json.dumps(made.to_dict()))
    assert main(words(release, tmp_path / "model")) == 2
    assert "pieces but" in capsys.readouterr().err
