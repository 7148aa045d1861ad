# SPDX-License-Identifier: Apache-2.0
"""``m2jax inspect``: what a config's parameters are and where they would lie. Allocates nothing."""

from __future__ import annotations

import argparse
import collections
import math
from typing import Any, NamedTuple


class Line(NamedTuple):
    """One parameter as it would lie on the mesh."""

    name: str
    shape: tuple[int, ...]
    logical_axes: tuple[str | None, ...]
    mesh_axes: tuple[Any, ...]
    bytes_per_device: int


def add_parser(subparsers: Any) -> None:
    """Declares the verb."""
    parser = subparsers.add_parser(
        "inspect",
        help="list a config's parameters: shape, axes, place, bytes per device",
        description="Lists parameters without allocating them, so any size fits on any machine.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE.py[:ARG]|NAME")
    parser.add_argument(
        "--devices", type=int, default=0, help="lay out for so many devices (default: those here)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the table and its sums."""
    from m2jax.config import UserError
    from m2jax.config_files import load_config
    from m2jax.train.origin import settled

    experiment = settled(load_config(args.config, args.overrides))
    if args.devices < 0:
        raise UserError(f"--devices {args.devices}: must be at least 1")
    devices = args.devices or experiment.mesh.cpu_devices or _devices_here()
    lines, shape = layout(experiment, devices)
    rows = [("parameter", "shape", "axes", "mesh axes", "bytes/device")]
    for line in lines:
        axes = " ".join(axis or "-" for axis in line.logical_axes)
        place = " ".join(_axis_text(axis) for axis in line.mesh_axes)
        size = " ".join(map(str, line.shape))
        rows.append((line.name, size, axes, place, f"{line.bytes_per_device:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join(cells[:-1]) + "  " + row[-1].rjust(widths[-1]))
    total = sum(math.prod(line.shape) for line in lines)
    each = sum(line.bytes_per_device for line in lines)
    mesh = " ".join(f"{axis}={size}" for axis, size in shape.items())
    parts = collections.Counter[str]()
    for line in lines:
        parts[line.name.split(".")[0]] += math.prod(line.shape)
    print("parts: " + ", ".join(f"{name} {size:,}" for name, size in parts.most_common()))
    print(f"{total:,} parameters; {each:,} bytes per device on {devices} devices ({mesh})")
    return 0


def layout(experiment: Any, devices: int) -> tuple[list[Line], dict[str, int]]:
    """The parameters of an experiment on a mesh of so many devices, and the mesh's sizes.

    Those of the heads and of the tokenizer that its losses ask for are among them.

    Raises:
        UserError: the mesh does not fit the devices, a parameter does not divide over it, or the
            losses do not go together.
    """
    import jax
    from jax.sharding import AbstractMesh, AxisType

    from m2jax.dist.mesh import AXES, mesh_shape
    from m2jax.dist.sharding import AxisRules
    from m2jax.models import params
    from m2jax.train.main import make_task

    sizes = mesh_shape(experiment.mesh, devices)
    # Shardings take an abstract mesh as well as a real one, though not all signatures say so.
    mesh: Any = AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    model = make_task(experiment, mesh).model
    places = params.flatten(params.shardings(model, mesh, AxisRules()))
    lines = []
    for row in params.table(model):
        place = places[row.name]
        shard = math.prod(place.shard_shape(row.shape))
        item = jax.numpy.dtype(row.dtype).itemsize
        lines.append(Line(row.name, row.shape, row.logical_axes, tuple(place.spec), shard * item))
    return lines, dict(zip(AXES, sizes, strict=True))


def _axis_text(axis: Any) -> str:
    return "+".join(axis) if isinstance(axis, tuple) else axis or "-"


def _devices_here() -> int:
    import jax

    return jax.device_count()
