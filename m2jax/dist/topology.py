# SPDX-License-Identifier: Apache-2.0
"""Machines that are not here: their devices as the compiler describes them, and their datasheets.

``describe("v5p:4x4x8")`` gives 128 devices that programs can be compiled for without any TPU
(libtpu holds the compiler); ``h100:32x8`` does the same for 32 hosts of 8 GPUs where JAX's CUDA
plugin is installed. Memory, arithmetic and link rates are the vendors' published ones, per device.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from m2jax import machine_name
from m2jax.config import UserError
from m2jax.dist import gpu_target
from m2jax.dist.host import no_tpu

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One device: what a program may use and how fast it goes at best."""

    kind: str
    platform: str  # tpu | cuda
    peak_flops: float  # FLOP/s of bfloat16 matrix products with float32 sums
    memory: float  # bytes a program may use
    memory_rate: float  # bytes/s
    link_rate: float  # bytes/s and direction: one torus link of a TPU, all of NVLink of a GPU
    network_rate: float  # bytes/s out of a device to other slices or hosts
    narrow_factor: float = 2.0  # peak of products of 8-bit numbers / peak_flops
    clock: float = 0.0  # Hz; turns libtpu's cycle estimates into seconds, 0: there are none
    clock_known: bool = True  # False: assumed, so seconds from cycles only compare programs
    most: tuple[int, ...] = ()  # shape of the largest slice, sizes in order; GPUs of a host
    source: str = ""

    @property
    def ridge(self) -> float:
        """FLOPs per byte of main memory below which memory is what bounds."""
        return self.peak_flops / self.memory_rate


_DOCS = "cloud.google.com/tpu/docs/"
# Memory is what libtpu reports as usable. Clocks follow from peak = MXUs x side^2 x 2 x clock.
CHIPS: Mapping[str, Chip] = {
    "v4": Chip(
        kind="v4", platform="tpu", peak_flops=275e12, memory=30.75 * GIB, memory_rate=1.2e12,
        link_rate=50e9, network_rate=3.125e9, narrow_factor=1.0, clock=1.05e9,
        most=(16, 16, 16),
        source=_DOCS + "v4; links: Jouppi et al. 2023, table 4",
    ),
    "v5e": Chip(
        kind="v5e", platform="tpu", peak_flops=197e12, memory=15.75 * GIB, memory_rate=819e9,
        link_rate=50e9, network_rate=3.125e9, clock=1.5e9, most=(16, 16),
        source=_DOCS + "v5e (400 GB/s over 4 ports, both ways; 6.4 Tbit/s for 256 chips)",
    ),
    "v5p": Chip(
        kind="v5p", platform="tpu", peak_flops=459e12, memory=95.74 * GIB, memory_rate=2765e9,
        link_rate=100e9, network_rate=6.25e9, clock=1.75e9, most=(16, 16, 24),
        source=_DOCS + "v5p (1200 GB/s over 6 ports, both ways; 50 Gbit/s of network)",
    ),
    "v6e": Chip(
        kind="v6e", platform="tpu", peak_flops=918e12, memory=31.25 * GIB, memory_rate=1638e9,
        link_rate=100e9, network_rate=12.5e9, clock=1.75e9, clock_known=False,
        most=(16, 16),
        source=_DOCS + "v6e (800 GB/s over 4 ports, both ways; 4 x 200 Gbit/s for 8 chips)",
    ),
    "h100": Chip(
        kind="h100", platform="cuda", peak_flops=989.4e12, memory=0.94 * 80e9, memory_rate=3.35e12,
        link_rate=450e9, network_rate=50e9, most=(8,),
        source="nvidia.com H100 SXM datasheet, dense; one 400 Gbit/s adapter per GPU",
    ),
    "h200": Chip(
        kind="h200", platform="cuda", peak_flops=989.4e12, memory=0.94 * 141e9, memory_rate=4.8e12,
        link_rate=450e9, network_rate=50e9, most=(8,),
        source="nvidia.com H200 SXM datasheet, dense; one 400 Gbit/s adapter per GPU",
    ),
}  # fmt: skip

# What jax calls the devices of a kind (``device_kind``), as a pattern. PCIe cards are slower.
_KINDS = {
    "v4": r"TPU v4",
    "v5e": r"TPU v5 ?(lite|e)",
    "v5p": r"TPU v5p?",
    "v6e": r"TPU v6 ?(lite|e)",
    "h100": r"NVIDIA H100 80GB HBM3",
    "h200": r"NVIDIA H200",
}


def chip_of(device_kind: str) -> Chip | None:
    """The datasheet of a device that jax calls so; ``None`` for a CPU and for what is not known."""
    found = [name for name, kind in _KINDS.items() if re.fullmatch(kind, device_kind)]
    return CHIPS[found[0]] if found else None


KNOWN = (
    "v4:2x2x1 ... v4:8x8x16, v5e:2x2 ... v5e:16x16, v5p:2x2x1 ... v5p:16x16x24, "
    "v6e:2x2 ... v6e:16x16, N*TPU for N slices (2*v5p:4x4x8), h100:8, h100:32x8, h200:8, h200:32x8 "
    "(hosts x GPUs)"
)
# Two cores of a v4 chip work as one device; libtpu describes them apart unless told.
MEGACORE: Mapping[str, dict[str, str]] = {"v4": {"chip_config_name": "megacore"}}


class Topology(NamedTuple):
    """A named machine."""

    name: str
    chip: Chip
    devices: tuple[Any, ...]  # jax devices that can be compiled for, never run on
    slices: int  # joined by the data-center network


def describe(name: str) -> Topology:
    """The machine called ``TYPE:SHAPE``, or ``N*TYPE:SHAPE`` for several TPU slices.

    Raises:
        UserError: an unknown name, a shape that does not exist, or a compiler that is missing.
    """
    parts = machine_name.split(name)
    if parts is None or parts.kind not in CHIPS:
        raise UserError(f"--topology {name}: no such machine: use one of {KNOWN}")
    chip, slices = CHIPS[parts.kind], parts.slices or 1
    sizes = sorted(parts.sizes) if chip.platform == "tpu" else parts.sizes[-1:]
    if len(sizes) != len(chip.most) or any(a > b for a, b in zip(sizes, chip.most, strict=True)):
        most = "x".join(map(str, chip.most))
        what = "slices" if chip.platform == "tpu" else "hosts"
        raise UserError(f"--topology {name}: {chip.kind} {what} go to {most}: use one of {KNOWN}")
    if chip.platform == "tpu":
        return Topology(name, chip, _tpu(name, chip, parts.shape, slices), slices)
    if parts.slices or len(parts.sizes) > 2:
        raise UserError(f"--topology {name}: GPUs come as {chip.kind}:HOSTSxGPUS: write h100:32x8")
    hosts, each = (1, *parts.sizes)[-2:]
    return Topology(name, chip, _gpu(name, chip, hosts, each), 1)


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """Keeps programs for described devices out of jax's persistent cache.

    It would store them, but cannot read them back without a device of their kind, and says so at
    every later compile.
    """
    key = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, key)
    jax.config.update(key, 1e9)
    try:
        yield
    finally:
        jax.config.update(key, before)


def _tpu(name: str, chip: Chip, shape: str, slices: int) -> tuple[Any, ...]:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology {name}: compiling for TPUs needs the package libtpu, for Linux on x86-64: "
            "pip install 'jax[tpu]'"
        )
    try:
        with no_tpu():
            found = topologies.get_topology_desc(
                platform="tpu",
                topology_name=f"{chip.kind}:{shape}",
                num_slices=slices,
                **MEGACORE.get(chip.kind, {}),
            )
        return tuple(found.devices)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--topology {name}: libtpu refuses it ({reason}): use one of {KNOWN}"
        ) from None


def _gpu(name: str, chip: Chip, hosts: int, each: int) -> tuple[Any, ...]:
    plugins = [p for p in ("jax_cuda12_plugin", "jax_cuda13_plugin") if importlib.util.find_spec(p)]
    if not plugins:
        raise UserError(
            f"--topology {name}: compiling for GPUs needs JAX's CUDA plugin (no GPU): "
            "pip install 'jax[cuda13]'"
        )
    try:
        found = topologies.get_topology_desc(
            platform="cuda",
            target_config=gpu_target.text(chip.kind),
            topology=f"1x{hosts}x{each}",
        )
        return tuple(found.devices)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--topology {name}: {plugins[0]} refuses it ({reason}): "
            "start with JAX_PLATFORMS=cpu JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1"
        ) from None
