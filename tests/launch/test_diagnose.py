# SPDX-License-Identifier: Apache-2.0
"""Start-up failures that ``m2jax doctor`` sees from inside a job."""

import json
import os
import re
import socket
from types import SimpleNamespace

import pytest

from m2jax.cli.main import main
from m2jax.launch import diagnose
from m2jax.launch.diagnose import findings


def look(environ=None, **changes):
    """Names of what is wrong, with what is said."""
    asked = {"via": "single", "coordinator": "", "platform": "cpu"} | changes
    return {f.name: f"{f.says} -> {f.mend}" for f in findings(environ or {}, **asked) if not f.ok}


def unknown(host, port):
    raise socket.gaierror(-2, "Name or service not known")


@pytest.mark.parametrize(
    ("environ", "changes", "name", "said"),
    [
        ({"SLURM_JOB_ID": "7"}, {}, "launcher", "SLURM_JOB_ID is set.*start with srun"),
        ({"PBS_JOBID": "7"}, {}, "launcher", "start with mpirun"),
        ({"https_proxy": "p"}, {"via": "slurm"}, "proxy", "https_proxy.*no_proxy"),
        ({}, {"coordinator": "gpu1:61441", "resolve": unknown}, "coordinator", "gpu1: .*not known"),
        ({"M2JAX_DATA": "/nowhere/at/all"}, {}, "M2JAX_DATA", "/nowhere/at/all: cannot be read"),
    ],
)
def test_what_is_wrong_is_said(environ, changes, name, said) -> None:
    found = look(environ, **changes)
    assert set(found) == {name}
    assert re.search(said, found[name]), found[name]


def test_a_gpu_that_jax_does_not_use_and_a_small_shm(tmp_path, monkeypatch) -> None:
    driver = tmp_path / "version"
    driver.write_text("")
    small = SimpleNamespace(f_blocks=16384, f_frsize=4096)
    monkeypatch.setattr(diagnose.os, "statvfs", lambda path: small)
    found = look(driver=driver)
    assert set(found) == {"gpu", "/dev/shm"}
    assert "64 MiB" in found["/dev/shm"]
    large = SimpleNamespace(f_blocks=2**20, f_frsize=4096)
    monkeypatch.setattr(diagnose.os, "statvfs", lambda path: large)
    assert not look(driver=driver, platform="gpu")
    assert not look(driver=tmp_path / "none")


def test_a_healthy_process(tmp_path) -> None:
    environ = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "M2JAX_DATA": str(tmp_path)}
    known = {"via": "slurm", "coordinator": "[::1]:61441", "resolve": lambda host, port: host}
    assert not look(environ, **known, driver=tmp_path / "none")
    assert not look({"http_proxy": "p"})  # one process talks to nobody


@pytest.mark.parametrize("broken", [False, True])
def test_doctor_shows_them(broken, capsys, monkeypatch) -> None:
    for name in [n for n in os.environ if n.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    if broken:
        monkeypatch.setenv("SLURM_JOB_ID", "7")
    main(["doctor", "--json"])
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert checks["launcher"]["ok"] is not broken
    assert checks["proxy"]["ok"]


def test_doctor_shows_a_launchers_incomplete_variables(capsys, monkeypatch) -> None:
    monkeypatch.setenv("M2JAX_PROCESS_ID", "1")
    main(["doctor", "--json"])
    launcher = json.loads(capsys.readouterr().out)["checks"]["launcher"]
    assert not launcher["ok"]
    assert "M2JAX_COORDINATOR: not set" in launcher["says"]
