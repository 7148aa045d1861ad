# SPDX-License-Identifier: Apache-2.0
"""AdvBCT: training an embedding whose vectors can be compared with an old model's.

The head on a backbone's features, the discriminator, one loss and the statistics it moves: pure
functions, differentiable in the parameters. Source: Pan et al. 2023 (arXiv 2305.19812) and the code
its authors publish.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from m2jax.losses import adversarial, compatible
from m2jax.losses.compatible import OldClasses
from m2jax.models import batch_norm as norm
from m2jax.models.batch_norm import Affine, Running, batch_norm

HIDDEN = 100  # of the discriminator


class Discriminator(NamedTuple):
    """Linear, batch norm, ReLU, linear: which model a feature is of."""

    fc1: Float[Array, "dim hidden"]
    fc1_bias: Float[Array, " hidden"]
    bn: Affine
    fc2: Float[Array, "hidden 2"]
    fc2_bias: Float[Array, " 2"]


class Params(NamedTuple):
    """What is trained beside the backbone."""

    projection: Float[Array, "enc dim"]
    bn: Affine
    classifier: Float[Array, "dim classes"]
    discriminator: Discriminator
    elastic: Float[Array, " classes"]


class State(NamedTuple):
    """Running statistics of both norms."""

    bn: Running
    discriminator: Running


class Batch(NamedTuple):
    """One step's input."""

    features: Float[Array, "batch enc"]  # of the new backbone
    old: Float[Array, "batch dim"]  # the old model's embeddings of the same images, as they are
    labels: Int[Array, " batch"]


class Terms(NamedTuple):
    """The loss, its parts and what they come from."""

    total: Float[Array, ""]
    classification: Float[Array, ""]
    boundary: Float[Array, ""]
    adversarial: Float[Array, ""]
    embedding: Float[Array, "batch dim"]
    logits: Float[Array, "batch classes"]
    discriminated: tuple[Float[Array, "batch 2"], Float[Array, "batch 2"]]  # new, old
    violations: Int[Array, ""]


def init(rng: jax.Array, enc: int, dim: int, classes: int) -> tuple[Params, State]:
    """Fresh parameters; matrices uniform within 1/sqrt(rows), elastic weights within 1."""
    keys = jax.random.split(rng, 7)

    def uniform(key: jax.Array, shape: tuple[int, ...], bound: float) -> jax.Array:
        return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

    affine, running = norm.fresh(dim)
    inner, inner_running = norm.fresh(HIDDEN)
    discriminator = Discriminator(
        uniform(keys[0], (dim, HIDDEN), dim**-0.5),
        uniform(keys[1], (HIDDEN,), dim**-0.5),
        inner,
        uniform(keys[2], (HIDDEN, 2), HIDDEN**-0.5),
        uniform(keys[3], (2,), HIDDEN**-0.5),
    )
    params = Params(
        uniform(keys[4], (enc, dim), enc**-0.5),
        affine,
        uniform(keys[5], (dim, classes), dim**-0.5),
        discriminator,
        uniform(keys[6], (classes,), 1.0),
    )
    return params, State(running, inner_running)


def embed(
    params: Params, state: State, features: Float[Array, "batch enc"], *, train: bool
) -> tuple[Float[Array, "batch dim"], Running]:
    """The embedding (compared by cosine; not of unit length itself) and its norm's statistics."""
    return batch_norm(features @ params.projection, params.bn, state.bn, train=train)


def discriminate(
    params: Discriminator, running: Running, x: Float[Array, "batch dim"], *, train: bool
) -> tuple[Float[Array, "batch 2"], Running]:
    """Log probabilities of new and old."""
    hidden, running = batch_norm(x @ params.fc1 + params.fc1_bias, params.bn, running, train=train)
    logits = jax.nn.relu(hidden) @ params.fc2 + params.fc2_bias
    return jax.nn.log_softmax(logits, axis=-1), running


def loss(
    params: Params,
    state: State,
    batch: Batch,
    old: OldClasses,
    *,
    progress: float | Float[Array, ""],
    adversarial_weight: float | Float[Array, ""],
    tau: float = 1.0,
) -> tuple[Float[Array, ""], tuple[Terms, State]]:
    """One training step's loss and the state after it.

    The discriminator sees new and old features in two calls, each normalised by its own batch and
    each moving its running statistics. The old model's features get no gradient.

    Args:
        params: trained.
        state: running statistics before the step.
        batch: of the step.
        old: statistics of the old model's classes.
        progress: share of all steps that are done: the ramp of the reversed gradient.
        adversarial_weight: as ``adversarial.adversarial_weight`` of the epoch.
        tau: where elastic boundaries move to.
    """
    embedding, running = embed(params, state, batch.features, train=True)
    logits = embedding @ params.classifier
    classification = adversarial.cross_entropy(logits, batch.labels)
    reversed_ = adversarial.reverse_gradient(embedding, adversarial.reversal_ramp(progress))
    inner = state.discriminator
    new_said, inner = discriminate(params.discriminator, inner, reversed_, train=True)
    stored = jax.lax.stop_gradient(batch.old)
    old_said, inner = discriminate(params.discriminator, inner, stored, train=True)
    told = adversarial.domain_loss(new_said, old_said)
    bound = compatible.boundary(embedding, batch.labels, params.elastic, old, tau=tau)
    total = classification + bound.loss + adversarial_weight * told
    terms = Terms(
        total,
        classification,
        bound.loss,
        told,
        embedding,
        logits,
        (new_said, old_said),
        jnp.asarray(bound.violations),
    )
    return total, (terms, State(running, inner))
