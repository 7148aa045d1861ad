# SPDX-License-Identifier: Apache-2.0
"""Described machines: names, devices, what libtpu is told, and the text of a GPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from m2jax import config
from m2jax.config import UserError
from m2jax.dist import gpu_target, host
from m2jax.dist.mesh import make_mesh
from m2jax.dist.topology import describe

tpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed (it exists for Linux on x86-64 alone)",
)


@tpu
@pytest.mark.parametrize(
    ("name", "chips", "slices"),
    [("v5e:2x4", 8, 1), ("v5p:2x2x4", 16, 1), ("v6e:4x4", 16, 1), ("2*v5p:2x2x2", 16, 2)],
)
def test_devices_of_a_slice_make_a_mesh(name: str, chips: int, slices: int) -> None:
    machine = describe(name)
    assert len(machine.devices) == chips
    assert machine.slices == slices
    assert {len(device.coords) for device in machine.devices} == {3}
    mesh = make_mesh(config.Mesh(replica=slices, fsdp=4), machine.devices)
    assert set(mesh.devices.flat) == set(machine.devices)
    for replica in mesh.devices:  # only the first axis leaves a slice
        assert len({getattr(d, "slice_index", 0) for d in replica.flat}) == 1


@pytest.mark.parametrize("name", ["", "v5p", "v5p:", "v5p:4x", "V5P:2x2x1", "v5p:2x2x1 ", "0x1", "0*v5e:2x2"])
def test_other_names_are_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(UserError, match="no such machine.*v5p:2x2x1.*h100:32x8") as caught:
        describe(name)
    assert "\n" not in str(caught.value)


def test_a_gpu_described() -> None:
    small, large = gpu_target.text("h100"), gpu_target.text("h200")
    assert small.count("{") == small.count("}")
    assert "core_count: 132" in small
    assert "device_memory_size: 141000000000" in large
    assert {*small.split()} ^ {*large.split()} == {
        "80000000000", "141000000000", "3350000000000", "4800000000000", '"NVIDIA', "H100", "H200",
    } - {'"NVIDIA'}  # fmt: skip


def test_libtpu_is_told_only_where_nobody_did_and_only_while_it_loads(monkeypatch) -> None:
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v6e-8")
    for name in set(host.NO_TPU) - {"TPU_ACCELERATOR_TYPE"}:
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    with host.no_tpu():
        assert {**host.NO_TPU, "TPU_ACCELERATOR_TYPE": "v6e-8"}.items() <= os.environ.items()
    assert dict(os.environ) == before


@tpu
@pytest.mark.parametrize(
    "first",
    [
        "from m2jax.dist.host import load_devices; load_devices()",
        "import m2jax; m2jax.start(quiet=True)",  # what `m2jax train` does first
    ],
)
def test_devices_load_quietly_where_libtpu_finds_no_tpu(first: str) -> None:
    code = first + "; import jax; jax.devices()"
    environ = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_tpu_is_a_pci_device(tmp_path: Path) -> None:
    assert not host.has_tpu(tmp_path / "nowhere")
    for number, vendor in enumerate(("0x10de", "0x8086")):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "vendor").write_text(vendor + "\n")
    assert not host.has_tpu(tmp_path)
    (tmp_path / "0" / "vendor").write_text("0x1ae0\n")
    assert host.has_tpu(tmp_path)


@pytest.mark.skipif(
    not any(map(importlib.util.find_spec, ("jax_cuda12_plugin", "jax_cuda13_plugin"))),
    reason="JAX's CUDA plugin is not installed",
)
def test_gpus_of_two_hosts_without_a_gpu() -> None:
    code = (
        "from m2jax.cli.plan import compile_only; compile_only()\n"
        "from m2jax.dist.topology import describe\n"
        "devices = describe('h100:2x4').devices\n"
        "print(len(devices), sorted({d.process_index for d in devices}), devices[0].device_kind)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "8 [0, 1] NVIDIA H100 SXM\n", done.stderr
