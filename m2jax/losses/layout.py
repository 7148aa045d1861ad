# SPDX-License-Identifier: Apache-2.0
"""Which devices gather features, which pass them on, and which share no negatives at all.

Every block-wise form of the contrastive loss is one algorithm (``ring.py``) on a differently cut
mesh. The axes that hold the rows of a batch are cut into

    alone    groups that exchange nothing (grouped aggregation)
    rings    one side's rows travel round these, slow links outside fast ones
    held     the other side's rows are gathered over these and stay

so ``ring`` holds nothing, ``chunked`` rotates nothing, and ``grid`` is between the two.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
from jax import lax
from jax.sharding import AxisType, Mesh, PartitionSpec

from m2jax.config import UserError
from m2jax.dist.sharding import BATCH_AXES

SLOW_AXIS = "replica"  # between slices, over the data-center network
IMPLS = ("local", "chunked", "ring", "grid", "hierarchical", "grouped")
TILED = tuple(impl for impl in IMPLS if impl != "local")  # those of ring.py


class Layout(NamedTuple):
    """The devices of a mesh in the same order, with its row axes cut by what they do."""

    mesh: Mesh | None  # None: one device
    rows: tuple[str, ...] = ()  # all axes that rows lie over, major first
    alone: tuple[str, ...] = ()
    rings: tuple[tuple[str, ...], ...] = ()  # outer (slow) first; the axes of one ring are one loop
    held: tuple[str, ...] = ()

    @property
    def row_spec(self) -> PartitionSpec:
        """How an array lies whose first axis is the batch."""
        return PartitionSpec(self.rows)

    def size(self, axes: tuple[str, ...]) -> int:
        """Devices along some axes together."""
        return math.prod(self.mesh.shape[axis] for axis in axes) if self.mesh else 1


def make_layout(mesh: Mesh | None, impl: str, group: int | None = None) -> Layout:
    """Cuts the row axes of a mesh for one way of doing the reduction.

    Args:
        mesh: any of ``BATCH_AXES`` it has hold rows; other axes hold copies. ``None``: one device.
        impl: ``local`` and ``chunked`` gather over everything, ``ring`` over nothing, ``grid`` over
            ``group`` devices, ``hierarchical`` over a whole slice; ``grouped`` gathers over
            ``group`` devices and exchanges nothing beyond.
        group: devices that gather among each other, neighbours in row order. Not given: what sends
            least for ``grid``, everything for ``grouped``; no other ``impl`` takes it.

    Raises:
        ValueError: ``group`` with an ``impl`` that does not take it.
        UserError: a group that does not fit the axes of the mesh, or cuts a host of GPUs in two.
    """
    if group is not None and impl not in ("grid", "grouped"):
        raise ValueError(f"contrastive_loss: group={group} means nothing to impl={impl!r}")
    axes = [axis for axis in BATCH_AXES if mesh is not None and axis in mesh.axis_names]
    sizes = {axis: mesh.shape[axis] for axis in axes} if mesh is not None else {}
    everything = math.prod(sizes.values())
    if mesh is None or everything == 1:
        if group not in (None, 1):
            raise UserError(f"contrastive_loss: group={group} on one device: leave group out")
        return Layout(None)
    inside = math.prod(size for axis, size in sizes.items() if axis != SLOW_AXIS)
    default = {"ring": 1, "hierarchical": inside, "grid": _cheapest(sizes, inside)}
    held = group or default.get(impl, everything)
    cut, rows, moving, held_axes = _split(mesh, sizes, _cut(sizes, held))
    layout = Layout(cut, rows=rows, held=held_axes)
    if impl == "grouped":
        _check_hosts(mesh, axes, held)
        return layout._replace(alone=moving)
    fast = tuple(axis for axis in moving if axis != SLOW_AXIS)
    slow = tuple(axis for axis in moving if axis == SLOW_AXIS)
    return layout._replace(rings=tuple(ring for ring in (slow, fast) if layout.size(ring) > 1))


def check_beside_cudnn(mesh: Mesh, impl: str, group: int | None = None) -> None:
    """Refuses a layout that needs a mesh of its own, on which an axis of this one is two.

    jax takes no second mesh in a program with cuDNN's attention, which it partitions by a rule of
    the attention's own.

    Raises:
        UserError: a group that takes a part of an axis.
    """
    if impl == "dense" or make_layout(mesh, impl, group).mesh in (None, mesh):
        return
    sizes = [mesh.shape[axis] for axis in BATCH_AXES if axis in mesh.axis_names]
    whole = [math.prod(sizes[i:]) for i in range(len(sizes), -1, -1)]
    text = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    raise UserError(
        f"loss.contrastive.impl={impl}: its group takes a part of an axis of the mesh ({text}), "
        f"which jax refuses beside model.attention=cudnn: set loss.contrastive.group to one of "
        f"{', '.join(str(n) for n in sorted(set(whole)))}"
    )


def _cut(sizes: dict[str, int], held: int) -> dict[str, int]:
    """The part of each axis that is held: the fastest axes are taken first."""
    left, parts = held, {}
    for axis in reversed(sizes):
        size = sizes[axis]
        parts[axis] = size if left % size == 0 else left if size % left == 0 else 0
        if not parts[axis]:
            break
        left //= parts[axis]
    if left != 1 or 0 in parts.values():
        text = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
        raise UserError(
            f"contrastive_loss: group={held} does not fit a mesh of {text}: choose a multiple or a "
            "divisor of the last axes' sizes"
        )
    return parts


def _cheapest(sizes: dict[str, int], inside: int) -> int:
    """Devices to hold so that fewest blocks are sent: rotated ones + held ones, inside a slice."""

    def fits(held: int) -> bool:
        try:
            _cut(sizes, held)
        except UserError:
            return False
        return True

    everything = math.prod(sizes.values())
    fitting = [held for held in range(1, inside + 1) if inside % held == 0 and fits(held)]
    return min(fitting, key=lambda held: (everything // held + held, held))


def _split(
    mesh: Mesh, sizes: dict[str, int], parts: dict[str, int]
) -> tuple[Mesh, tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """(mesh, axes of rows, those that are not held, those that are), from the held part of each.

    Where each axis is held whole or not at all it is the mesh itself. Else the same devices in the
    same order, each row axis in two: AXIS outside, AXIS_held inside. A jitted program accepts
    several meshes over one order of devices, so nothing moves.
    """
    if all(part in (1, sizes[axis]) for axis, part in parts.items()):
        held = tuple(axis for axis, size in sizes.items() if parts[axis] == size > 1)
        return mesh, tuple(sizes), tuple(axis for axis in sizes if axis not in held), held
    shape, names = [], []
    for axis, size in mesh.shape.items():
        shape += [size // parts[axis], parts[axis]] if axis in parts else [size]
        names += [axis, f"{axis}_held"] if axis in parts else [axis]
    rows = tuple(name for axis in sizes for name in (axis, f"{axis}_held"))
    types = (AxisType.Auto,) * len(names)
    cut = Mesh(mesh.devices.reshape(shape), tuple(names), axis_types=types)
    return cut, rows, rows[::2], rows[1::2]


def _check_hosts(mesh: Mesh, axes: list[str], group: int) -> None:
    """A group lies inside one host or is made of whole hosts: M2's nodes. TPUs have one network."""
    if mesh.devices.flat[0].platform == "tpu":
        return
    order = [*axes, *(axis for axis in mesh.axis_names if axis not in axes)]
    devices = mesh.devices.transpose([mesh.axis_names.index(axis) for axis in order])
    groups = devices.reshape(-1, group * (devices.size // math.prod(devices.shape[: len(axes)])))
    hosts = [{device.process_index for device in row} for row in groups]
    total = sum(len(found) for found in hosts)
    if total > len(set().union(*hosts)) and max(len(found) for found in hosts) > 1:
        raise UserError(
            f"contrastive_loss: group={group} cuts hosts in two: choose a multiple of the devices "
            "per host, or a divisor"
        )


def gather(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Rows of all devices along ``axes``, in the order of a ``PartitionSpec`` of them.

    One axis after the other: over many chips in one go, XLA for TPUs sends the sum of arrays that
    are zero elsewhere, which takes twice the bytes (benchmarks/contrastive.md).
    """
    for axis in reversed(axes):
        if lax.axis_size(axis) > 1:
            x = lax.all_gather(x, axis, tiled=True)
    return x


def scatter_sum(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """The transpose of ``gather``: rows added up over devices, each keeping its own."""
    for axis in axes:
        if lax.axis_size(axis) > 1:
            x = lax.psum_scatter(x, axis, scatter_dimension=0, tiled=True)
    return x
