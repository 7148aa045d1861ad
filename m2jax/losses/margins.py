# SPDX-License-Identifier: Apache-2.0
"""Additive margins on the cosines of a softmax classifier: ArcFace and CosFace.

Sources: Deng et al. 2019 (ArcFace), Wang et al. 2018 (CosFace). As in the code that AdvBCT's
authors publish, ArcFace has no easy-margin correction past pi - margin, and rows labelled -1 are
scaled only.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

SCALE, MARGIN = 30.0, 0.3


def arcface(
    cosines: Float[Array, "batch classes"],
    labels: Int[Array, " batch"],
    *,
    scale: float = SCALE,
    margin: float = MARGIN,
) -> Float[Array, "batch classes"]:
    """Logits scale * cos(theta + margin) at the label and scale * cos(theta) elsewhere."""
    # At +-1 the derivative of the arc cosine has no bound.
    bound = 1 - jnp.finfo(cosines.dtype).eps
    theta = jnp.arccos(jnp.clip(cosines, -bound, bound))
    at_label = _at_label(cosines, labels)
    return scale * jnp.where(at_label, jnp.cos(theta + margin), cosines)


def cosface(
    cosines: Float[Array, "batch classes"],
    labels: Int[Array, " batch"],
    *,
    scale: float = SCALE,
    margin: float = MARGIN,
) -> Float[Array, "batch classes"]:
    """Logits scale * (cos(theta) - margin) at the label and scale * cos(theta) elsewhere."""
    return scale * jnp.where(_at_label(cosines, labels), cosines - margin, cosines)


def _at_label(
    cosines: Float[Array, "batch classes"], labels: Int[Array, " batch"]
) -> Bool[Array, "batch classes"]:
    return labels[:, None] == jnp.arange(cosines.shape[1])
