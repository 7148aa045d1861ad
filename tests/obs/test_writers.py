# SPDX-License-Identifier: Apache-2.0
"""Who hears of metrics: the file always, TensorBoard and Weights & Biases by config."""

import importlib.util
import sys

import pytest

from m2jax.config import Log, UserError
from m2jax.obs.metrics import MetricWriter, read_rows


def write(folder, log, step=0):
    writer = MetricWriter(folder, step, log, {"train": {"steps": 3}})
    writer.write(step + 1, {"loss": 2.5})
    writer.close()


def test_tensorboard_is_by_config(tmp_path):
    for wanted in (True, False):
        folder = tmp_path / str(wanted)
        folder.mkdir()
        write(folder, Log(tensorboard=wanted))
        assert (folder / "tensorboard").exists() == wanted
        assert read_rows(folder / "metrics.jsonl") == [{"step": 1, "loss": 2.5}]


def test_wandb_without_the_package_is_one_line_and_touches_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    (tmp_path / "metrics.jsonl").write_text('{"step": 9, "loss": 1.0}\n')
    with pytest.raises(UserError, match=r"log\.wandb=mine: needs the package wandb: pip install"):
        MetricWriter(tmp_path, 0, Log(wandb="mine"))
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 9, "loss": 1.0}]


class FakeWandB:
    """Remembers what it is told."""

    class errors:
        """As in the package."""

        class Error(Exception):
            """As in the package."""

    def __init__(self):
        self.told = []

    def init(self, **kwargs):
        if kwargs["project"] == "forbidden":
            raise self.errors.Error("no API key\nconfigured")
        self.told.append(("init", kwargs))
        return self

    def log(self, values, step):
        self.told.append(("log", step, values))

    def finish(self):
        self.told.append(("finish",))


def test_wandb_hears_what_the_file_hears_and_goes_on_as_the_same_run(tmp_path, monkeypatch):
    fake = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    write(tmp_path, Log(wandb="mine"))
    write(tmp_path, Log(wandb="mine"), step=1)
    kinds = [entry[0] for entry in fake.told]
    assert kinds == ["init", "log", "finish"] * 2
    first, second = (fake.told[i][1] for i in (0, 3))
    assert first == second
    assert first["project"] == "mine"
    assert first["config"] == {"train": {"steps": 3}}
    assert [entry[1:] for entry in fake.told if entry[0] == "log"] == [
        (1, {"loss": 2.5}),
        (2, {"loss": 2.5}),
    ]
    with pytest.raises(UserError, match=r"log\.wandb=forbidden: no API key: log in") as caught:
        MetricWriter(tmp_path, 0, Log(wandb="forbidden"))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs wandb")
@pytest.mark.filterwarnings("ignore")  # its own
def test_wandb_offline_leaves_a_run_in_the_work_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    write(tmp_path, Log(wandb="mine"))
    assert list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
