# SPDX-License-Identifier: Apache-2.0
"""Weights from a mapped file onto their devices, one layer of one parameter in memory at a time.

A parameter of ours stacks all layers of an encoder, so it is many times the largest tensor of a
file. Its buffer is made where it belongs, sharded, and filled layer by layer in place; the host
holds no more than the piece on its way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from m2jax.config import UserError
from m2jax.models import params as params_lib
from m2jax.models.params import Abstract, Params

CHUNK = 2**22  # numbers looked at together when a piece is searched for NaN

# Layer (or None: the whole parameter) -> name in the file, and the array in our layout. An array
# with fewer rows than its place is followed by rows of zeros.
Pieces = Mapping[int | None, tuple[str, np.ndarray]]


def place(
    model: Abstract,
    places: Params,
    pieces: Mapping[str, Pieces],
    *,
    fresh: Callable[[Sequence[str]], Mapping[str, jax.Array]],
) -> Params:
    """Puts every parameter where it belongs.

    Args:
        model: shapes and dtypes of the parameters; pieces are cast to the latter.
        places: a sharding for each.
        pieces: by parameter name.
        fresh: makes initial values of the parameters that pieces do not cover.

    Raises:
        UserError: a piece holds NaN or infinity, or a number too large for its new dtype.
    """
    shapes, shardings = params_lib.flatten(model.params), params_lib.flatten(places)
    partial = [n for n, s in shapes.items() if not _covered(pieces.get(n, {}), s.shape)]
    started = dict(fresh(partial)) if partial else {}
    done = {}
    for name, shape in shapes.items():
        start = started.pop(name, None)
        done[name] = _assemble(shape, shardings[name], pieces.get(name, {}), start)
    return jax.tree_util.tree_map_with_path(
        lambda path, _: done[params_lib.dotted(path)], model.params
    )


def _covered(pieces: Pieces, shape: tuple[int, ...]) -> bool:
    return None in pieces or (bool(pieces) and len(pieces) == shape[0])


def _assemble(
    shape: jax.ShapeDtypeStruct, sharding: Sharding, pieces: Pieces, start: jax.Array | None
) -> jax.Array:
    """One parameter, from its pieces and, where they leave gaps, its initial values."""
    if None in pieces:
        return _put(*pieces[None], shape.shape, shape.dtype, sharding)
    whole = _zeros(shape.shape, shape.dtype, sharding)() if start is None else start
    fill, layer_sharding = _filler(sharding), sharding
    if isinstance(sharding, NamedSharding):
        layer_sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    for layer, (name, array) in pieces.items():
        piece = _put(name, array, shape.shape[1:], shape.dtype, layer_sharding)
        whole = fill(whole, piece, layer)
        # Without this the next pieces pile up in memory while this one is still being copied.
        whole.block_until_ready()
    return whole


@functools.cache
def _zeros(shape: tuple[int, ...], dtype: Any, sharding: Sharding) -> Callable[[], jax.Array]:
    return jax.jit(functools.partial(jnp.zeros, shape, dtype), out_shardings=sharding)


@functools.cache
def _filler(sharding: Sharding) -> Callable[..., jax.Array]:
    """Writes one layer of a stack in place; compiled once per sharding and shape."""

    def fill(whole: jax.Array, piece: jax.Array, layer: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(whole, piece, layer, 0)

    return jax.jit(fill, donate_argnums=0, out_shardings=sharding)


def _put(
    name: str, array: np.ndarray, shape: tuple[int, ...], dtype: Any, sharding: Sharding
) -> jax.Array:
    """An array on its devices; each shard reads its own slice of the file alone."""
    return jax.make_array_from_callback(
        shape, sharding, lambda index: _block(name, array, index, shape, dtype)
    )


def _block(
    name: str, array: np.ndarray, index: Any, shape: tuple[int, ...], dtype: Any
) -> np.ndarray:
    """A slice of ``array`` as a fresh array of ``dtype``, zeros where it has no rows."""
    want = [len(range(*part.indices(size))) for part, size in zip(index, shape, strict=True)]
    have = array[index]
    block = (np.empty if list(have.shape) == want else np.zeros)(want, dtype)
    with np.errstate(over="ignore"):  # told as infinity below
        block[tuple(slice(0, n) for n in have.shape)] = have
    flat = block.reshape(-1)
    for first in range(0, flat.size, CHUNK):
        if not np.isfinite(flat[first : first + CHUNK]).all():
            raise UserError(
                f"{name}: holds NaN or infinity as {np.dtype(dtype).name}: "
                "use an undamaged checkpoint, or --dtype float32 if it was cast"
            )
    return block
