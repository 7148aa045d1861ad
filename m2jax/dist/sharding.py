# SPDX-License-Identifier: Apache-2.0
"""From logical axis names to places on the mesh.

A parameter says what its axes *are* (``embed``, ``mlp``, ``vocab``); one ``AxisRules`` says where such
an axis *lies*. A new parallel layout is an edit of the rules alone. What used to be called pjit is
``jax.jit`` with these shardings.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from m2jax.config import UserError

BATCH_AXES = ("replica", "data", "fsdp")  # mesh axes that share the rows of a batch

MeshAxes = str | tuple[str, ...] | None


@dataclass(frozen=True, kw_only=True)
class AxisRules:
    """Mesh axes of each logical axis; ``None`` keeps the axis whole on every device."""

    batch: MeshAxes = BATCH_AXES
    embed: MeshAxes = "fsdp"  # the residual width of weights
    heads: MeshAxes = "model"  # all heads' channels
    mlp: MeshAxes = "model"
    vocab: MeshAxes = "model"
    features: MeshAxes = None  # output dimension of the ITC heads
    layers: MeshAxes = None  # the scanned axis of a stack

    @property
    def rows(self) -> MeshAxes:
        """The axes of ``batch`` without those of ``embed``: for arrays that have both."""
        width = _as_tuple(self.embed)
        return tuple(axis for axis in _as_tuple(self.batch) if axis not in width)

    def spec(self, logical_axes: Sequence[str | None]) -> PartitionSpec:
        """The partition of an array whose axes are named.

        Raises:
            UserError: an unknown logical name, or one mesh axis used for two axes of the array.
        """
        known = {"rows", *(field.name for field in dataclasses.fields(self))}
        for name in logical_axes:
            if name is not None and name not in known:
                raise UserError(f"logical axis {name!r}: no such rule: use one of {sorted(known)}")
        placed = [None if name is None else getattr(self, name) for name in logical_axes]
        used = [axis for entry in placed if entry for axis in _as_tuple(entry)]
        twice = sorted({axis for axis in used if used.count(axis) > 1})
        if twice:
            raise UserError(
                f"axes {tuple(logical_axes)}: mesh axis {twice[0]!r} is used twice: change AxisRules"
            )
        return PartitionSpec(*placed)

    def sharding(
        self, mesh: Mesh, logical_axes: Sequence[str | None], shape: Sequence[int], name: str = ""
    ) -> NamedSharding:
        """The sharding of one array; every partitioned axis must divide.

        Raises:
            UserError: an axis does not divide over its mesh axes.
        """
        spec = self.spec(logical_axes)
        for size, entry in zip(shape, spec, strict=True):
            parts = 1
            for axis in _as_tuple(entry):
                parts *= mesh.shape[axis]
            if size % parts:
                raise UserError(
                    f"{name or 'array'} {tuple(shape)}: {size} does not divide over {parts} devices "
                    f"of mesh axis {entry!r}: change the mesh or the size"
                )
        return NamedSharding(mesh, spec)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over every batch axis, all else whole: how input batches lie."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_shards(sizes: Mapping[str, int]) -> int:
    """In how many parts the rows of a batch lie, from the sizes of the mesh's axes.

    An axis that is not there counts as 1.
    """
    return math.prod(sizes.get(axis, 1) for axis in BATCH_AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def spread(array: np.ndarray | jax.Array, mesh: Mesh | None) -> jax.Array:
    """Rows that every process of a mesh has whole, shared out over its batch axes.

    The last row fills up what does not divide: whoever takes the result cuts off the rest. Without
    a mesh they go to one device as they are.
    """
    if mesh is None:
        return jnp.asarray(array)
    rows = np.asarray(array)
    missing = -len(rows) % batch_shards(mesh.shape)
    rows = np.concatenate([rows, np.repeat(rows[-1:], missing, axis=0)])
    return jax.make_array_from_callback(rows.shape, batch_sharding(mesh), lambda part: rows[part])


def mesh_of(array: jax.Array) -> Mesh | None:
    """The mesh an array lies on; ``None`` where that is one device of this process."""
    place = array.sharding
    if isinstance(place, NamedSharding) and isinstance(place.mesh, Mesh) and place.mesh.size > 1:
        return place.mesh
    return None


_active: contextvars.ContextVar[tuple[Mesh, AxisRules] | None] = contextvars.ContextVar(
    "active_rules", default=None
)


@contextlib.contextmanager
def use_rules(mesh: Mesh, rules: AxisRules) -> Iterator[None]:
    """Makes ``constrain`` place activations while a function is traced inside this block."""
    token = _active.set((mesh, rules))
    try:
        yield
    finally:
        _active.reset(token)


@contextlib.contextmanager
def gathered(mesh: Mesh | None) -> Iterator[Callable[[jax.Array], jax.Array]]:
    """For a function being traced: its activations lie by the usual rules, its result is whole.

    Gives what to call on the result. Without a mesh nothing is placed.
    """
    if mesh is None:
        yield lambda result: result
        return
    with use_rules(mesh, AxisRules()):
        yield lambda result: jax.lax.with_sharding_constraint(result, replicated(mesh))


def constrain(x: jax.Array, logical_axes: Sequence[str | None]) -> jax.Array:
    """Pins an activation to its place on the mesh; does nothing outside ``use_rules``."""
    active = _active.get()
    if active is None:
        return x
    mesh, rules = active
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, rules.spec(logical_axes)))


def _as_tuple(entry: MeshAxes) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
