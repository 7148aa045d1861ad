# SPDX-License-Identifier: Apache-2.0
"""The machine a job asks for: hosts, chips, slices. Names are those of ``m2jax plan``."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from m2jax import machine_name
from m2jax.config import UserError
from m2jax.machine_name import MachineName

# Chips of a slice -> its usual shape. Where chips form a cube there are others of the same size.
FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
CUBE = {
    4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8",
    512: "8x8x8", 1024: "8x8x16", 2048: "8x16x16",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Tpu:
    """How Google's products call one TPU generation."""

    shapes: Mapping[int, str]
    gke: str  # node label cloud.google.com/gke-tpu-accelerator
    gce: str  # accelerator types are this, a dash, and a count
    cores: int  # per chip, in that count
    runtime: str  # image of a TPU VM
    most: int  # chips of the largest slice

    def accelerator_type(self, chips: int) -> str:
        """``v5p-256`` for 128 chips: the older generations count cores."""
        return f"{self.gce}-{chips * self.cores}"


TPUS: Mapping[str, Tpu] = MappingProxyType(
    {
        "v4": Tpu(
            shapes=CUBE, gke="tpu-v4-podslice", gce="v4", cores=2,
            runtime="tpu-ubuntu2204-base", most=4096,
        ),
        "v5e": Tpu(
            shapes=FLAT, gke="tpu-v5-lite-podslice", gce="v5litepod", cores=1,
            runtime="v2-alpha-tpuv5-lite", most=256,
        ),
        "v5p": Tpu(
            shapes=CUBE, gke="tpu-v5p-slice", gce="v5p", cores=2,
            runtime="v2-alpha-tpuv5", most=6144,
        ),
        "v6e": Tpu(
            shapes=FLAT, gke="tpu-v6e-slice", gce="v6e", cores=1,
            runtime="v2-alpha-tpuv6e", most=256,
        ),
    }
)  # fmt: skip
HOST_CHIPS = 4  # of a TPU host, but for the one-chip slice
GPUS = ("h100", "h200", "gpu")  # "gpu" is any other
EXAMPLES = "v5p:4x4x8, 2*v6e:16x16 (two slices), h100:32x8 (hosts x GPUs), gpu:2x4 (any other GPU)"

_ARGUMENT = re.compile(r"([a-z0-9]+)-(\d+)")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the job runs on."""

    platform: str  # tpu | gpu | cpu
    kind: str = ""  # a key of TPUS, or one of GPUS
    shape: str = ""  # of one TPU slice, as 4x4x8
    slices: int = 1  # TPU slices, joined by the data-center network
    hosts: int = 1  # of one slice
    host_chips: int = 1  # accelerators of a host; of a CPU host 0

    @property
    def all_hosts(self) -> int:
        """Hosts of the job."""
        return self.hosts * self.slices

    @property
    def tpu(self) -> Tpu:
        """Google's names for it."""
        return TPUS[self.kind]

    def __str__(self) -> str:
        if self.platform == "tpu":
            return f"{f'{self.slices}*' if self.slices > 1 else ''}{self.kind}:{self.shape}"
        return f"{self.kind}:{self.hosts}x{self.host_chips}" if self.kind else f"cpu:{self.hosts}"


def choose(topology: str, nodes: int, argument: str) -> Machine:
    """The machine from what the user said, in this order: a topology, the config's argument, nodes.

    Args:
        topology: ``TYPE:SHAPE`` or ``N*TYPE:SHAPE``; "" if not said.
        nodes: hosts; 0 if not said. Checked against the other two.
        argument: of the config (``configs/pretrain_10b.py:v5p-128``): ``TYPE-CHIPS`` where it
            names a machine, else anything.

    Raises:
        UserError: a name or shape that does not exist, or two that disagree.
    """
    if nodes < 0:
        raise UserError(f"--nodes {nodes}: must be at least 1")
    named = _ARGUMENT.fullmatch(argument)
    if topology:
        machine = parse(topology)
        where = f"--topology {topology}"
    elif named and (named[1] in TPUS or named[1] in GPUS):
        machine = _of_argument(argument, named[1], int(named[2]))
        where = f"the config's argument {argument}"
    else:
        return Machine(platform="cpu", hosts=nodes or 1, host_chips=0)
    if nodes and nodes != machine.all_hosts:
        raise UserError(
            f"--nodes {nodes}: {where} has {machine.all_hosts} hosts: leave --nodes out, or change "
            "the other"
        )
    return machine


def as_one_host(machine: Machine) -> Machine:
    """Eight chips of a flat machine, which outside of Kubernetes are one VM and not two."""
    flat = machine.platform == "tpu" and machine.tpu.shapes is FLAT
    if flat and machine.hosts * machine.host_chips == 8:
        return dataclasses.replace(machine, hosts=1, host_chips=8)
    return machine


def parse(name: str) -> Machine:
    """The machine called ``TYPE:SHAPE`` or ``N*TYPE:SHAPE``.

    Raises:
        UserError: no such machine.
    """
    parts = machine_name.split(name)
    if parts is None or (parts.kind not in TPUS and parts.kind not in GPUS):
        raise UserError(f"--topology {name}: no such machine: use one like {EXAMPLES}")
    kind = parts.kind
    if kind in TPUS:
        return _slices(name, parts)
    if parts.slices or len(parts.sizes) > 2:
        raise UserError(f"--topology {name}: GPUs come as {kind}:HOSTSxGPUS: write {kind}:32x8")
    hosts, each = (1, *parts.sizes)[-2:]
    return Machine(platform="gpu", kind=kind, hosts=hosts, host_chips=each)


def _slices(name: str, parts: MachineName) -> Machine:
    tpu, sizes, shape = TPUS[parts.kind], parts.sizes, parts.shape
    chips = math.prod(sizes)
    rising = list(sizes) == sorted(sizes)
    large = len(sizes) == 3 and all(size % 4 == 0 for size in sizes) and rising
    there = shape in tpu.shapes.values() or (tpu.shapes is CUBE and large and chips <= tpu.most)
    if not there:
        more = ", or AxBxC of multiples of 4, rising" if tpu.shapes is CUBE else ""
        raise UserError(
            f"--topology {name}: no such slice: use one of {', '.join(tpu.shapes.values())}{more}"
        )
    each = min(chips, HOST_CHIPS)
    return Machine(
        platform="tpu",
        kind=parts.kind,
        shape=shape,
        slices=parts.slices or 1,
        hosts=chips // each,
        host_chips=each,
    )


def _of_argument(argument: str, kind: str, chips: int) -> Machine:
    """``v5p-128`` is one slice of the usual shape, ``h100-256`` is hosts of 8 GPUs."""
    if kind in GPUS:
        each = min(chips, 8)
        if chips < 1 or chips % each:
            raise UserError(
                f"{argument}: {chips} GPUs are no whole hosts of 8: "
                f"say --topology {kind}:HOSTSxGPUS"
            )
        return parse(f"{kind}:{chips // each}x{each}")
    shapes = TPUS[kind].shapes
    if chips not in shapes:
        raise UserError(
            f"{argument}: no usual shape has {chips} chips: say --topology {kind}:SHAPE"
        )
    return parse(f"{kind}:{shapes[chips]}")
