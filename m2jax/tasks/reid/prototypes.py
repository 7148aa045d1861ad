# SPDX-License-Identifier: Apache-2.0
"""How alike identities are: prototypes that stay on the devices, rows spread over the mesh.

A refresh only starts a copy and an anchor's similarities only a product: nothing waits until their
numbers are read, so training goes on meanwhile.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from m2jax.config import UserError
from m2jax.dist.sharding import BATCH_AXES


class Prototypes:
    """One vector per identity: a classifier's weights, or means of features.

    Args:
        identities: how many.
        dim: of a vector.
        rng: of the first vectors, drawn from N(0, 1) as the published sampler does.
        mesh: rows lie over its batch axes; one device if not given.
    """

    def __init__(
        self, identities: int, dim: int, rng: jax.Array, *, mesh: Mesh | None = None
    ) -> None:
        self.identities = identities
        axes = () if mesh is None else tuple(a for a in BATCH_AXES if a in mesh.axis_names)
        self._parts = 1 if mesh is None else int(np.prod([mesh.shape[a] for a in axes]))
        self._place = None if mesh is None else NamedSharding(mesh, PartitionSpec(axes))
        self._rows = self._spread(jax.random.normal(rng, (identities, dim)))

    def _spread(self, rows: jax.Array) -> jax.Array:
        """A copy in its place, filled up to a multiple of the devices."""
        padded = jnp.pad(rows, ((0, -len(rows) % self._parts), (0, 0)))
        return jnp.copy(padded) if self._place is None else jax.device_put(padded, self._place)

    def refresh(self, weights: Float[Array, "identities dim"]) -> None:
        """Takes a copy of an identity's row each; returns at once.

        Raises:
            UserError: another number of identities or another width.
        """
        if weights.shape != (self.identities, self._rows.shape[1]):
            raise UserError(
                f"prototypes: {weights.shape} for {(self.identities, self._rows.shape[1])}: "
                "give one row per identity"
            )
        # Added to zero: a donated buffer of the trainer's may be reused after it has been read.
        self._rows = self._spread(weights + 0)

    def similarities(self, anchor: int) -> Float[np.ndarray, " identities"]:
        """Cosines of all identities with one; waits for what was started before."""
        return np.asarray(_cosines(self._rows, anchor))[: self.identities]


@jax.jit
def _cosines(rows: Float[Array, "n dim"], anchor: int) -> Float[Array, " n"]:
    unit = rows / jnp.maximum(jnp.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return jnp.matmul(unit, unit[anchor], precision="highest")


def moved(
    rows: Float[Array, "n dim"],
    features: Float[Array, "batch dim"],
    labels: Int[Array, " batch"],
    momentum: float = 0.9,
) -> Float[Array, "n dim"]:
    """Running means of features (our choice): each present identity's row moves to its mean.

    Args:
        rows: of all identities; zeros: not seen yet, takes the mean as it is.
        features: of a batch.
        labels: whose they are.
        momentum: share of the old row that stays.
    """
    total = jnp.zeros_like(rows).at[labels].add(features)
    count = jnp.zeros(len(rows)).at[labels].add(1.0)[:, None]
    mean = total / jnp.maximum(count, 1)
    kept = jnp.where(rows.any(1, keepdims=True), momentum, 0.0)
    return jnp.where(count > 0, kept * rows + (1 - kept) * mean, rows)
