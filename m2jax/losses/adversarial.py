# SPDX-License-Identifier: Apache-2.0
"""Features that a classifier of their origin cannot tell apart: gradient reversal and confusion.

Sources: Ganin and Lempitsky 2015 (gradient reversal and its schedule), Tzeng et al. 2015 (uniform
confusion), Pan et al. 2023 (AdvBCT: old model against new one). That scenes are removed in one of
these two ways is our choice: the paper on hard batches (arXiv 2112.04761) names an adversarial loss
and, in what we could read of it, neither its form nor its weight.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.custom_vjp
def reverse_gradient(x: jax.Array, alpha: Float[Array, ""] | float) -> jax.Array:
    """The identity, whose gradient is ``-alpha`` times that of what follows."""
    return x


def _reverse_fwd(x: jax.Array, alpha: jax.Array | float) -> tuple[jax.Array, jax.Array | float]:
    return x, alpha


def _reverse_bwd(alpha: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    return -alpha * cotangent, jnp.zeros_like(alpha)


reverse_gradient.defvjp(_reverse_fwd, _reverse_bwd)


def reversal_ramp(progress: Float[Array, ""] | float) -> Float[Array, ""]:
    """Alpha = 2 / (1 + exp(-10 p)) - 1 at a share ``p`` of all steps; from 0 to almost 1."""
    return 2 / (1 + jnp.exp(-10.0 * jnp.asarray(progress))) - 1


def adversarial_weight(epoch: int | Int[Array, ""], epochs: int) -> float | Float[Array, ""]:
    """AdvBCT's factor on its adversarial loss, (E - e + 1) / E, epochs from 0: above 1 at first."""
    return (epochs - epoch + 1) / epochs


def domain_loss(new: Float[Array, "batch 2"], old: Float[Array, "batch 2"]) -> Float[Array, ""]:
    """NLL of a discriminator that says 0 for the new model's rows and 1 for the old one's.

    Args:
        new: its log probabilities on features that came through ``reverse_gradient``.
        old: its log probabilities on the old model's features.
    """
    return -new[:, 0].mean() - old[:, 1].mean()


def cross_entropy(
    logits: Float[Array, "batch classes"], labels: Int[Array, " batch"]
) -> Float[Array, ""]:
    """Mean over the rows of the negative log probability of their labels."""
    log_p = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.take_along_axis(log_p, labels[:, None], axis=-1).mean()


def uniform_confusion(logits: Float[Array, "batch scenes"]) -> Float[Array, ""]:
    """How far a scene classifier is from saying of every row that all scenes are as likely.

    -1/S sum_s log softmax(logits)_s, whose least value is log S.
    """
    return -jax.nn.log_softmax(logits, axis=-1).mean()


def scene_adversary(
    features: Float[Array, "batch dim"],
    kernel: Float[Array, "dim scenes"],
    scenes: Int[Array, " batch"],
    *,
    form: str,
    weight: float | Float[Array, ""],
    alpha: float | Float[Array, ""] = 1.0,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Trains a linear scene classifier, and features that it cannot read scenes from.

    Args:
        features: of the backbone; they get a gradient that takes scenes out of them.
        kernel: of the classifier; it gets the gradient of its own cross-entropy alone.
        scenes: camera (or place, or drawing style) of each row.
        form: ``reversal``: the features get -alpha times the classifier's gradient; ``confusion``:
            the features get that of ``uniform_confusion`` of the classifier as it stands.
        weight: of what the features get.
        alpha: of ``reversal``, as ``reversal_ramp`` gives it.

    Returns:
        (what to add to the loss, the classifier's cross-entropy to be logged).

    Raises:
        ValueError: an unknown form.
    """
    if form == "reversal":
        told = cross_entropy(reverse_gradient(features, weight * alpha) @ kernel, scenes)
        return told, told
    if form != "confusion":
        raise ValueError(f"scene_adversary: form={form!r}: use reversal or confusion")
    told = cross_entropy(jax.lax.stop_gradient(features) @ kernel, scenes)
    confused = uniform_confusion(features @ jax.lax.stop_gradient(kernel))
    return told + weight * confused, told
