# SPDX-License-Identifier: Apache-2.0
"""The image-text contrastive loss (ITC).

``dense`` is the readable reference: one global matrix of logits. Under a mesh whose batch axes hold
the rows the compiler partitions it, so it is also the fast form for small batches.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from m2jax.dist.sharding import BATCH_AXES


def contrastive_loss(
    image: Float[Array, "batch dim"],
    text: Float[Array, "batch dim"],
    scale: Float[Array, ""] | float,
    *,
    impl: str = "dense",
    mesh: Mesh | None = None,
    label_smoothing: float = 0.0,
) -> Float[Array, ""]:
    """Mean of the image-to-text and text-to-image cross-entropies (Radford et al. 2021, figure 3).

    Args:
        image: unit rows; row i belongs to row i of ``text``.
        text: unit rows.
        scale: multiplies the cosines (it is not a logarithm).
        impl: ``dense``.
        mesh: where the rows lie over the axes of ``BATCH_AXES`` it has; ``None`` on one device.
        label_smoothing: share of the target spread evenly over all rows.

    Returns:
        The loss in float32, or in the inputs' precision where that is higher.

    Raises:
        ValueError: an unknown ``impl`` or shapes that differ.
    """
    if impl != "dense":
        raise ValueError(f"contrastive_loss: impl={impl!r} is unknown: use 'dense'")
    if image.shape != text.shape:
        raise ValueError(f"contrastive_loss: image {image.shape} and text {text.shape} differ")
    wide = jnp.promote_types(image.dtype, jnp.float32)
    logits = jnp.asarray(scale, wide) * (image.astype(wide) @ text.astype(wide).T)
    if mesh is not None:
        rows = tuple(axis for axis in BATCH_AXES if axis in mesh.axis_names)
        logits = jax.lax.with_sharding_constraint(
            logits, NamedSharding(mesh, PartitionSpec(rows, None))
        )
    both = _cross_entropy(logits, label_smoothing) + _cross_entropy(logits.T, label_smoothing)
    return 0.5 * both


def _cross_entropy(logits: Float[Array, "n n"], smoothing: float) -> Float[Array, ""]:
    """Mean over rows of logsumexp(row) - target . row, the target being the (smoothed) diagonal."""
    target = (1.0 - smoothing) * jnp.diagonal(logits)
    if smoothing:
        target = target + smoothing * logits.mean(axis=1)
    return jnp.mean(jax.nn.logsumexp(logits, axis=1) - target)
