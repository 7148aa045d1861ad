# SPDX-License-Identifier: Apache-2.0
"""The objective of a visual tokenizer: vector-quantised knowledge distillation (BEiT v2)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


class Distilled(NamedTuple):
    """Scalars, each a mean over patches."""

    cosine: Float[Array, ""]  # of what the decoder tells and what it should
    gap: Float[Array, ""]  # squared distance of the codes and their words


def straight_through(
    codes: Float[Array, "batch patches dim"], words: Float[Array, "batch patches dim"]
) -> Float[Array, "batch patches dim"]:
    """The words, with the gradient of the codes (van den Oord et al. 2017, section 3.1)."""
    return codes + lax.stop_gradient(words - codes)


def distillation_loss(
    told: Float[Array, "batch patches out"],
    target: Float[Array, "batch patches out"],
    codes: Float[Array, "batch patches dim"],
    words: Float[Array, "batch patches dim"],
    *,
    commitment: float = 1.0,
) -> tuple[Float[Array, ""], Distilled]:
    """Less cosine, plus the distance of codes and words, in float32 or wider.

    Peng et al. 2022 (arXiv 2208.06366), equation 2, per patch: 1 - cos(told, target) +
    |sg(codes) - words|^2 + |codes - sg(words)|^2. They move the words by a running mean in place of
    the second term; here the gradient moves them, so the codebook is a parameter like any other.

    Args:
        told: of the decoder.
        target: what it should tell; gets no gradient.
        codes: unit rows of the encoder.
        words: unit rows of the codebook, the nearest to the codes.
        commitment: weight of both distances.
    """
    wide = jnp.promote_types(told.dtype, jnp.float32)
    a, b = told.astype(wide), lax.stop_gradient(target).astype(wide)
    norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    cosine = ((a * b).sum(-1) / jnp.maximum(norms, 1e-6)).mean()

    def apart(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.square(x - y).sum(-1).mean()

    to_words = apart(codes, lax.stop_gradient(words))
    loss = 1 - cosine + commitment * (to_words + apart(lax.stop_gradient(codes), words))
    return loss, Distilled(cosine, to_words)


def words_in_use(ids: Int[Array, "batch patches"], codes: int) -> Float[Array, ""]:
    """Share of a codebook's words that occur in a batch; a small one tells of a collapse."""
    return jnp.zeros(codes, jnp.float32).at[ids.reshape(-1)].set(1.0).mean()
