# SPDX-License-Identifier: Apache-2.0
"""The batch-hard triplet loss (Hermans et al. 2017), its hardest pairs found over a whole mesh.

Each device keeps its anchors; blocks of rows go round the ring of devices and each anchor remembers
the farthest row of its identity and the nearest of another, with their features. The backward pass
sends no features at all: what an anchor owes its two partners is added to blocks of gradients that
go round once and end at home. Values and gradients are those of the dense loss over all rows, equal
distances included: of these the row that stands first in the global batch is taken.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from m2jax.losses.layout import Layout, make_layout
from m2jax.losses.ring import go_round

FLOOR = 1e-12  # of squared distances, before the root


class Triplet(NamedTuple):
    """A loss and the distances it was made of."""

    loss: Float[Array, ""]
    positive: Float[Array, " batch"]  # to the farthest row of the same identity, itself included
    negative: Float[Array, " batch"]  # to the nearest row of another; infinite where there is none


class Partner(NamedTuple):
    """The hardest partner of each anchor so far."""

    distance: Float[Array, " rows"]  # squared
    row: Int[Array, " rows"]  # in the global batch
    features: Float[Array, "rows dim"]


class _Block(NamedTuple):
    """Rows that travel."""

    features: Float[Array, "rows dim"]
    labels: Int[Array, " rows"]
    rows: Int[Array, " rows"]


def batch_hard(
    features: Float[Array, "batch dim"],
    labels: Int[Array, " batch"],
    *,
    margin: float | None = None,
    mesh: Mesh | None = None,
) -> Triplet:
    """Batch-hard triplet loss by Euclidean distances of features as they are.

    Args:
        features: rows; over the batch axes of ``mesh`` if there is one.
        labels: identities.
        margin: of the hinge relu(margin + d_ap - d_an); not given: the soft margin
            log(1 + exp(d_ap - d_an)).
        mesh: its devices' rows are one batch. Not given: one device.

    Returns:
        The mean over the anchors that have a negative, and all distances.
    """
    layout = make_layout(mesh, "ring")
    farthest, nearest = cast("tuple[jax.Array, jax.Array]", hardest(layout, features, labels))
    positive = jnp.sqrt(jnp.maximum(jnp.square(features - farthest).sum(-1), FLOOR))
    has = jnp.isfinite(nearest).all(-1)
    gap = features - jnp.where(has[:, None], nearest, features)
    negative = jnp.sqrt(jnp.maximum(jnp.square(gap).sum(-1), FLOOR))
    apart = positive - negative
    each = jax.nn.softplus(apart) if margin is None else jax.nn.relu(apart + margin)
    loss = jnp.where(has, each, 0.0).sum() / jnp.maximum(has.sum(), 1)
    return Triplet(loss, positive, jnp.where(has, negative, jnp.inf))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def hardest(
    layout: Layout, features: Float[Array, "batch dim"], labels: Int[Array, " batch"]
) -> tuple[Float[Array, "batch dim"], Float[Array, "batch dim"]]:
    """Features of each row's farthest positive and nearest negative (infinite where none is)."""
    return _hardest_fwd(layout, features, labels)[0]


def _hardest_fwd(layout: Layout, features: jax.Array, labels: jax.Array) -> Any:
    ids = jnp.arange(len(features), dtype=jnp.int32)
    rows = layout.row_spec
    body = functools.partial(_find, layout)
    positive, negative = _on_devices(layout, body, (rows,) * 3, rows)(features, labels, ids)
    return (positive.features, negative.features), (positive.row, negative.row)


def _hardest_bwd(layout: Layout, partners: Any, cotangents: Any) -> tuple[Any, None]:
    rows = layout.row_spec
    ids = jnp.arange(len(partners[0]), dtype=jnp.int32)
    body = functools.partial(_return, layout)
    given = _on_devices(layout, body, (rows,) * 5, rows)(ids, *partners, *cotangents)
    return given, None


hardest.defvjp(_hardest_fwd, _hardest_bwd)


def _on_devices(layout: Layout, body: Any, inputs: Any, outputs: PartitionSpec) -> Any:
    if layout.mesh is None:
        return body
    return jax.shard_map(body, mesh=layout.mesh, in_specs=inputs, out_specs=outputs)


def _find(
    layout: Layout, features: jax.Array, labels: jax.Array, ids: jax.Array
) -> tuple[Partner, Partner]:
    """One device's anchors against the rows of all devices."""
    count, kind = len(features), features.dtype

    def start(distance: float) -> Partner:
        made = Partner(
            jnp.full(count, distance, kind),
            jnp.full(count, -1, jnp.int32),
            jnp.full(features.shape, jnp.inf, kind),
        )
        # What the loop carries differs from device to device, even what starts as a constant.
        return _varying(layout, made)

    def visit(block: _Block, found: tuple[Partner, Partner]) -> tuple[tuple[()], Any]:
        apart = squared_distances(features, block.features)
        same = labels[:, None] == block.labels[None]
        far, near = found
        far = _better(far, jnp.where(same, apart, -jnp.inf), block, sign=1)
        near = _better(near, jnp.where(same, jnp.inf, apart), block, sign=-1)
        return (), (far, near)

    block = _Block(features, labels, ids)
    _, found = go_round(layout.rings, block, (start(-jnp.inf), start(jnp.inf)), visit, _join)
    return found


def _varying(layout: Layout, tree: Any) -> Any:
    if layout.mesh is None:
        return tree
    return jax.tree.map(lambda x: lax.pcast(x, layout.rows, to="varying"), tree)


def _join(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, a, b)


def squared_distances(a: Float[Array, "m dim"], b: Float[Array, "n dim"]) -> Float[Array, "m n"]:
    """|a|^2 + |b|^2 - 2 a.b, in full precision."""
    product = jnp.matmul(a, b.T, precision="highest")
    return jnp.square(a).sum(-1)[:, None] + jnp.square(b).sum(-1)[None] - 2 * product


def _better(so_far: Partner, table: jax.Array, block: _Block, *, sign: int) -> Partner:
    """The harder of what is known and what a block offers; of equals the first in the batch."""
    at = jnp.argmax(sign * table, axis=1)
    distance = jnp.take_along_axis(table, at[:, None], axis=1)[:, 0]
    row = block.rows[at]
    ahead = (sign * distance > sign * so_far.distance) | (
        (distance == so_far.distance) & jnp.isfinite(distance) & (row < so_far.row)
    )
    return Partner(
        jnp.where(ahead, distance, so_far.distance),
        jnp.where(ahead, row, so_far.row),
        jnp.where(ahead[:, None], block.features[at], so_far.features),
    )


def _return(
    layout: Layout,
    ids: jax.Array,
    positive: jax.Array,
    negative: jax.Array,
    to_positive: jax.Array,
    to_negative: jax.Array,
) -> jax.Array:
    """What the anchors of all devices owe this device's rows."""

    def visit(block: jax.Array, held: tuple[()]) -> tuple[jax.Array, tuple[()]]:
        owed = jnp.zeros((len(block), to_positive.shape[1]), to_positive.dtype)
        for partner, debt in ((positive, to_positive), (negative, to_negative)):
            place = partner - block[0]
            here = (partner >= 0) & (place >= 0) & (place < len(block))
            # A row that is not here goes past the end, where it is dropped.
            at = jnp.where(here, place, len(block))
            owed = owed.at[at].add(jnp.where(here[:, None], debt, 0), mode="drop")
        return owed, held

    given, _ = go_round(layout.rings, ids, (), visit, _join)
    return given
