# SPDX-License-Identifier: Apache-2.0
"""Trainings in epochs: one process, one folder per run, and words that are refused."""

import math

import pytest

from m2jax.cli.main import main
from m2jax.config import UserError
from m2jax.tasks import epochs
from m2jax.tasks.reid import train as reid
from m2jax.tasks.retrieval import train_compatible


@pytest.mark.parametrize(
    "environ",
    [
        {"M2JAX_COORDINATOR": "a:1", "M2JAX_NUM_PROCESSES": "2", "M2JAX_PROCESS_ID": "1"},
        {"OMPI_COMM_WORLD_SIZE": "2"},
    ],
)
@pytest.mark.parametrize("verb", [["reid", "train"], ["retrieval", "train-compatible"]])
def test_several_processes_are_refused(tmp_path, capsys, monkeypatch, environ, verb):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    words = [*verb, "--layout", "emoji", "--out", str(tmp_path / "run"), "--epochs", "0"]
    words += ["--method", "none"] if verb[0] == "retrieval" else []
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "processes, and this trains in one" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()
    epochs.check_alone({**environ, "M2JAX_NUM_PROCESSES": "1"})


def test_the_setting_that_differs_is_named(tmp_path):
    settled = {"recipe": {"p": 4, "k": 2}, "settings": {"tower": {"width": 16}}, "init": False}
    epochs._claim(tmp_path / "run", settled)
    epochs._claim(tmp_path / "run", settled)
    changed = settled | {"settings": {"tower": {"width": 24}}}
    with pytest.raises(UserError, match=r"settings\.tower\.width is 16 there and 24 in this"):
        epochs._claim(tmp_path / "run", changed)
    with pytest.raises(UserError, match=r"recipe\.new is None there and 1 in this"):
        epochs._claim(tmp_path / "run", settled | {"recipe": {**settled["recipe"], "new": 1}})


@pytest.mark.parametrize("recipe", [reid.Recipe, train_compatible.Recipe])
@pytest.mark.parametrize("bad", [{"seed": -1}, {"learning_rate": math.nan}, {"log_every": 0}])
def test_recipes_that_cannot_be(recipe, bad):
    with pytest.raises(UserError, match="at least 1; seed: 0 or more; learning rate: above 0"):
        recipe(**bad)
