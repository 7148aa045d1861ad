# SPDX-License-Identifier: Apache-2.0
"""Parameters as data: nested dicts of arrays, with names, shapes, axes and places beside them.

Everything outside ``models`` sees a model as (graph, params): the graph is static, the parameters
are nested dicts that optax, Orbax and ``jax.tree`` take as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh

from m2jax.config_dual import Architecture, Dual
from m2jax.dist.sharding import AxisRules
from m2jax.models.dual import DualEncoder
from m2jax.models.m2 import M2Encoder

Params = dict[str, Any]  # nested; leaves are arrays (or shapes of them)


class Abstract(NamedTuple):
    """A model that was never allocated."""

    graph: nnx.GraphDef
    params: Params  # leaves: jax.ShapeDtypeStruct
    axes: dict[str, tuple[str | None, ...]]  # logical axes by dotted name


class Row(NamedTuple):
    """One line of a parameter table."""

    name: str
    shape: tuple[int, ...]
    logical_axes: tuple[str | None, ...]
    dtype: str


def create(cfg: Architecture, rngs: nnx.Rngs) -> M2Encoder | DualEncoder:
    """The module that ``cfg`` describes, with fresh parameters."""
    return DualEncoder(cfg, rngs) if isinstance(cfg, Dual) else M2Encoder(cfg, rngs)


def abstract(cfg: Architecture) -> Abstract:
    """Graph, parameter shapes and logical axes of the model ``cfg`` describes; takes no memory."""
    return abstract_of(lambda rngs: create(cfg, rngs))


def abstract_of(make: Callable[[nnx.Rngs], nnx.Module]) -> Abstract:
    """The same for any module."""
    graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    axes = {
        ".".join(map(str, path)): variable.get_metadata("logical_axes")
        for path, variable in nnx.to_flat_state(state)
    }
    return Abstract(graph, nnx.to_pure_dict(state), axes)


def initialise(cfg: Architecture, rng: jax.Array) -> Params:
    """Fresh parameters. Jit it with ``out_shardings`` to make each shard where it belongs."""
    return initialise_of(lambda rngs: create(cfg, rngs), rng)


def initialise_of(make: Callable[[nnx.Rngs], nnx.Module], rng: jax.Array) -> Params:
    """The same for any module."""
    return nnx.to_pure_dict(nnx.state(make(nnx.Rngs(params=rng))))


def beside(model: Abstract, key: str, other: Abstract) -> Abstract:
    """A model with another's parameters under ``key``; its graph stays the first one's."""
    axes = {f"{key}.{name}": value for name, value in other.axes.items()}
    return Abstract(model.graph, {**model.params, key: other.params}, {**model.axes, **axes})


def bind(graph: nnx.GraphDef, params: Params) -> Any:
    """The callable model: the ``M2Encoder`` or ``DualEncoder`` the graph is of."""
    return nnx.merge(graph, params)


def dotted(path: tuple[Any, ...]) -> str:
    """The name of a leaf from its ``jax.tree_util`` path: ``backbone.blocks.A.q.kernel``."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def flatten(params: Params) -> dict[str, Any]:
    """Leaves by dotted name, in the tree's own (sorted) order."""
    return {dotted(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def table(model: Abstract) -> list[Row]:
    """One row per parameter."""
    return [
        Row(name, leaf.shape, model.axes[name], leaf.dtype.name)
        for name, leaf in flatten(model.params).items()
    ]


def count(params: Params) -> int:
    """Number of parameters, the padding rows of the token table included."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def shardings(model: Abstract, mesh: Mesh, rules: AxisRules) -> Params:
    """The place of every parameter, as a tree like ``params``.

    Raises:
        UserError: a size does not divide over its mesh axes.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: rules.sharding(mesh, model.axes[dotted(path)], leaf.shape, dotted(path)),
        model.params,
    )
