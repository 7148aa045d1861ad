# SPDX-License-Identifier: Apache-2.0
"""The flag that keeps CPU collectives in order is set where it helps and nowhere else."""

import subprocess
import sys
from pathlib import Path

import pytest

from m2jax.dist import host
from m2jax.dist.host import IN_ORDER, THREADS, on_cpu, ready_cpu_collectives


@pytest.mark.parametrize(
    ("environ", "devices", "flags"),
    [
        ({"JAX_PLATFORMS": "cpu"}, 2, f"{IN_ORDER}=false"),
        ({"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--a=1"}, 2, f"--a=1 {IN_ORDER}=false"),
        ({"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{IN_ORDER}=true"}, 2, f"{IN_ORDER}=true"),
        ({"JAX_PLATFORMS": "cpu"}, 1, None),  # no collectives
        ({"JAX_PLATFORMS": "tpu"}, 8, None),
        ({"JAX_PLATFORMS": "cuda,cpu"}, 8, None),
    ],
)
def test_the_flag_is_for_cpus_with_several_devices(environ, devices, flags) -> None:
    ready_cpu_collectives(environ, processes=1, local_devices=devices)
    assert environ.get("XLA_FLAGS") == flags
    assert THREADS not in environ


def test_processes_get_threads_to_spare() -> None:
    environ = {"JAX_PLATFORMS": "cpu"}
    ready_cpu_collectives(environ, processes=2, local_devices=64)
    assert environ == {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{IN_ORDER}=false", THREADS: "256"}
    environ = {"JAX_PLATFORMS": "cpu", THREADS: "3"}
    ready_cpu_collectives(environ, processes=2, local_devices=1)
    assert environ[THREADS] == "3"
    environ = {"JAX_PLATFORMS": "tpu"}
    ready_cpu_collectives(environ, processes=2, local_devices=4)
    assert environ == {"JAX_PLATFORMS": "tpu"}


def test_without_a_platform_any_accelerator_means_no(monkeypatch) -> None:
    monkeypatch.setattr(host, "has_tpu", lambda: False)
    monkeypatch.setattr(host.importlib.metadata, "entry_points", lambda group: ())
    monkeypatch.setattr(host.importlib.util, "find_spec", lambda name: None)
    assert on_cpu({})
    with monkeypatch.context() as patch:
        patch.setattr(host, "has_tpu", lambda: True)
        assert not on_cpu({})
    with monkeypatch.context() as patch:  # as jax[cuda13] registers itself
        patch.setattr(host.importlib.metadata, "entry_points", lambda group: ("xla_cuda13",))
        assert not on_cpu({})


_CHILD = """
import os, sys
import jax
from m2jax.dist.bootstrap import start
jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))
start(quiet=True)
print(os.environ.get("XLA_FLAGS", "none"))
"""


@pytest.mark.parametrize(("devices", "flags"), [(2, f"{IN_ORDER}=false"), (1, "none")])
def test_start_sets_it_before_the_first_device(devices: int, flags: str, monkeypatch) -> None:
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    command = [sys.executable, "-c", _CHILD, str(devices)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.stdout.strip() == flags, done.stderr
