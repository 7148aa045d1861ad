# SPDX-License-Identifier: Apache-2.0
"""The mesh: how the devices of a run are laid out over the axes replica, data, fsdp and model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from m2jax import config
from m2jax.config import UserError

AXES = ("replica", "data", "fsdp", "model")  # slowest link first


def make_mesh(spec: config.Mesh, devices: Sequence[Any] | None = None) -> Mesh:
    """Lays the devices out so that the busiest axes get the fastest links.

    Args:
        spec: devices per axis, one of them possibly -1.
        devices: ``jax.Device``s; all of the run's if not given.

    Returns:
        A mesh whose axes are all of type Auto: the compiler places what no rule pins.

    Raises:
        UserError: the axes do not multiply to the number of devices, or slices do not fit.
    """
    chosen = list(jax.devices() if devices is None else devices)
    grid = arrange(mesh_shape(spec, len(chosen)), chosen)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def local_mesh(split: int = 1) -> Mesh:
    """This process's own devices, for work that processes do not share.

    Args:
        split: devices that one copy of the parameters is spread over; the rest share the rows.

    Raises:
        UserError: it does not divide the number of devices.
    """
    devices = jax.local_devices()
    if split < 1 or len(devices) % split:
        raise UserError(
            f"parameters over {split} devices: this process has {len(devices)}: use a number that "
            "divides them"
        )
    return make_mesh(config.Mesh(data=-1, fsdp=split), devices)


def mesh_shape(spec: config.Mesh, devices: int) -> tuple[int, ...]:
    """Sizes of ``AXES`` for a number of devices, with a -1 filled in.

    Raises:
        UserError: more than one -1, a size below 1, or a product that is not ``devices``.
    """
    sizes = [getattr(spec, axis) for axis in AXES]
    text = " ".join(f"mesh.{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"{text}: sizes must be at least 1, and one of them may be -1: change them")
    fixed = math.prod(size for size in sizes if size != -1)
    fits = fixed == devices or (-1 in sizes and devices % fixed == 0)
    if not fits:
        raise UserError(
            f"{text}: the axes take {fixed}{' x n' if -1 in sizes else ''} devices but there are "
            f"{devices}: change the mesh"
        )
    return tuple(devices // fixed if size == -1 else size for size in sizes)


def arrange(shape: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """Devices as an array of ``shape``; between TPU slices only the first axis may cross.

    GPUs and CPUs keep their order, which is by host, so the last axes stay inside a host.

    Raises:
        UserError: several TPU slices that the first axis does not divide over.
    """
    slices = {getattr(d, "slice_index", 0) for d in devices if d.platform == "tpu"}
    if len(slices) <= 1:
        return mesh_utils.create_device_mesh(
            tuple(shape), list(devices), allow_split_physical_axes=True
        )
    replica, *inner = shape
    if replica % len(slices):
        raise UserError(
            f"mesh.replica={replica}: the devices form {len(slices)} slices and only this axis may "
            f"cross between them: make it a multiple of {len(slices)}"
        )
    return mesh_utils.create_hybrid_device_mesh(
        (replica // len(slices), *inner),
        (len(slices), *(1 for _ in inner)),
        list(devices),
        allow_split_physical_axes=True,
    )
