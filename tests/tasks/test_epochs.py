# SPDX-License-Identifier: Apache-2.0
"""Trainings in epochs run in one process."""

import pytest

from m2jax.cli.main import main
from m2jax.tasks import epochs


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
