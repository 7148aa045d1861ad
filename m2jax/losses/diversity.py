# SPDX-License-Identifier: Apache-2.0
"""DC-Former's losses over several class tokens of one image (Li et al. 2023, AAAI).

The self-diverse constraint (SDC) drives the tokens of an image to be orthogonal; the dynamic weight
controller (DWC) leans on the pairs that are most alike. Formulas follow the published code.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from m2jax.losses.adversarial import cross_entropy
from m2jax.losses.triplet import batch_hard


def pair_similarities(tokens: Float[Array, "batch k dim"]) -> Float[Array, "batch pairs"]:
    """|cos| of every two tokens of an image; the norms have no floor, as published."""
    unit = tokens / jnp.linalg.norm(tokens, axis=-1, keepdims=True)
    first, second = jnp.triu_indices(tokens.shape[1], k=1)
    return jnp.abs((unit[:, first] * unit[:, second]).sum(-1))


def self_diverse(tokens: Float[Array, "batch k dim"], *, dynamic: bool = False) -> Float[Array, ""]:
    """Mean |cos| over pairs of tokens (SDC), or its softmax-weighted sum (DWC).

    Args:
        tokens: before batch normalisation; one token alone costs nothing.
        dynamic: weigh an image's pairs by softmax(|cos|); a gradient flows through the weights.
    """
    if tokens.shape[1] == 1:
        return jnp.zeros((), tokens.dtype)
    similar = pair_similarities(tokens)
    if dynamic:
        return (jax.nn.softmax(similar, axis=-1) * similar).sum(-1).mean()
    return similar.mean()


class Parts(NamedTuple):
    """DC-Former's loss and its parts."""

    total: Float[Array, ""]
    identity: Float[Array, " k"]  # cross-entropy per token
    triplet: Float[Array, " k"]
    diverse: Float[Array, ""]


def dcformer_loss(
    tokens: Float[Array, "batch k dim"],
    logits: Float[Array, "batch k classes"],
    labels: Int[Array, " batch"],
    *,
    dynamic: bool = False,
    weight: float = 1.0,
    mesh: Mesh | None = None,
) -> Parts:
    """mean_k CE_k + mean_k soft-margin batch-hard triplet_k + weight * diversity.

    Args:
        tokens: before batch normalisation.
        logits: of each token's own classifier, after batch normalisation.
        labels: identities.
        dynamic: DWC instead of SDC.
        weight: of diversity.
        mesh: hardest pairs are found over all its devices.
    """
    count = tokens.shape[1]
    identity = jnp.stack([cross_entropy(logits[:, k], labels) for k in range(count)])
    triplet = jnp.stack([batch_hard(tokens[:, k], labels, mesh=mesh).loss for k in range(count)])
    diverse = self_diverse(tokens, dynamic=dynamic)
    total = identity.mean() + triplet.mean() + weight * diverse
    return Parts(total, identity, triplet, diverse)
