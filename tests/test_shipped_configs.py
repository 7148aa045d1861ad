# SPDX-License-Identifier: Apache-2.0
"""The pretraining configs: every machine's mesh takes its devices, its batch and its parameters."""

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import pytest

from m2jax.cli.inspect import layout
from m2jax.config import UserError
from m2jax.config_files import load_config
from m2jax.dist.mesh import make_mesh
from m2jax.dist.sharding import BATCH_AXES
from m2jax.losses.layout import check_beside_cudnn

FOLDER = Path(__file__).parent.parent / "configs"
MACHINES = (
    "v5p-128",
    "v5p-512",
    "v6e-256",
    "h100-8",
    "h100-256",
    "h200-8",
    "h200-256",
)


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", ["pretrain_0p4b", "pretrain_1b", "pretrain_10b"])
def test_a_machine_takes_the_run(name: str, machine: str) -> None:
    experiment = load_config(f"{FOLDER}/{name}.py:{machine}")
    chips = int(machine.split("-")[1])
    lines, mesh = layout(experiment, chips)  # raises where a parameter does not divide
    assert math.prod(mesh.values()) == chips
    assert experiment.data.batch_size % math.prod(mesh[axis] for axis in BATCH_AXES) == 0
    assert mesh["fsdp"] <= 16  # never flat over a whole slice
    weights = sum(line.bytes_per_device for line in lines)
    assert 3 * weights < 31 * 2**30  # with two moments: fits every machine named


class Gpu:
    """A device as far as a mesh looks at it."""

    platform = "gpu"
    device_kind = ""

    def __init__(self, index: int):
        self.id, self.process_index = index, index // 8


@pytest.mark.parametrize("machine", [name for name in MACHINES if name.startswith("h")])
@pytest.mark.parametrize("name", ["pretrain_0p4b", "pretrain_1b", "pretrain_10b"])
def test_on_gpus_the_loss_goes_beside_cudnns_attention(name: str, machine: str) -> None:
    experiment = load_config(f"{FOLDER}/{name}.py:{machine}")
    mesh = make_mesh(experiment.mesh, [Gpu(i) for i in range(int(machine.split("-")[1]))])
    contrastive = experiment.loss.contrastive
    assert experiment.model.attention == "cudnn"
    check_beside_cudnn(mesh, contrastive.impl, contrastive.group or None)


@pytest.mark.parametrize("name", ["pretrain_0p4b", "pretrain_1b", "pretrain_10b"])
def test_machines_are_the_promised_ones(name: str) -> None:
    assert tuple(module(name).MACHINES) == MACHINES
    with pytest.raises(UserError, match="v6e-256"):
        load_config(f"{FOLDER}/{name}.py:v9-3")
    assert load_config(name).mesh == load_config(f"{FOLDER}/{name}.py:v5p-128").mesh
