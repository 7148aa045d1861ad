# SPDX-License-Identifier: Apache-2.0
"""An adapter on frozen features, trained on sentences and used on images (arXiv 2312.04160).

Sourced are the idea and the noise: "random perturbation" of the text features in training, so that
the adapter also covers where image features lie. Law and size of the noise, the adapter's form,
loss and schedule are not known; they are settings here. Size, loss and rows of the default are
those that did best on validation, the rest is our choice.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from m2jax.config import UserError
from m2jax.losses import multilabel

Params = dict[str, Any]
# Of the noise, by kind of adapter: what found most in scenes of validation (benchmarks/labels.md).
SIGMA = {"mlp": 0.126, "residual": 0.25}
COSINE_SCALE = 4.0  # logits per cosine, as TaI-DPT scales them


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How an adapter is made and trained."""

    kind: Literal["mlp", "residual"] = "mlp"  # scores by a layer, or by cosines to class prompts
    hidden: int = 0  # units; 0: twice the features
    share: float = 0.5  # of the adapter beside the feature itself; residual
    normalize: Literal["none", "l2"] = "none"  # of the features
    noise: Literal["gaussian", "uniform", "sphere"] = "gaussian"
    sigma: float = SIGMA["mlp"]  # deviation per entry, in units of the features' mean length
    renormalize: bool = False  # unit rows again after the noise; l2
    loss: Literal["ranking", "asymmetric", "bce"] = "ranking"
    epochs: int = 20
    least_steps: int = 600  # a small set is gone through more often than that
    batch: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    warmup: float = 0.05  # of all steps
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in get_type_hints(Settings).items():
            value = getattr(self, name)
            if get_args(choices) and value not in get_args(choices):
                raise UserError(f"{name}={value!r}: use one of {', '.join(get_args(choices))}")
        for name in ("epochs", "batch"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: must be at least 1")
        if not 0 <= self.share < 1:
            raise UserError(f"share={self.share}: must be at least 0 and below 1")
        if self.sigma < 0 or self.learning_rate <= 0 or self.hidden < 0:
            raise UserError("sigma, hidden: not below 0; learning_rate: above 0")
        if not (math.isfinite(self.sigma) and math.isfinite(self.learning_rate)):
            raise UserError("sigma, learning_rate: must be finite numbers")
        if not 0 <= self.seed < 2**31:
            raise UserError(f"seed={self.seed}: must be at least 0 and below 2^31")


class Trained(NamedTuple):
    """An adapter, and the mean loss of each epoch."""

    params: Params
    losses: np.ndarray


def perturbed(
    features: Float[Array, "batch dim"],
    rng: jax.Array,
    settings: Settings,
    length: float | Array = 1.0,
) -> Float[Array, "batch dim"]:
    """Features with noise, z + sigma length e; training alone sees it.

    Args:
        features: rows.
        rng: of this step; noise is fresh in every one.
        settings: law and size of the noise. ``gaussian`` N(0, 1) per entry, ``uniform`` of the same
            deviation, ``sphere`` a random direction of exactly the length that the Gaussian has in
            the mean square. Sizes that others used on unit rows: .08 (CLOSE), sqrt(.016) (CapDec).
        length: the features' mean length, so that one sigma means the same with and without l2.
    """
    shape = features.shape
    if settings.noise == "uniform":
        noise = jax.random.uniform(rng, shape, minval=-(3**0.5), maxval=3**0.5)
    else:
        noise = jax.random.normal(rng, shape)
    if settings.noise == "sphere":
        noise *= shape[-1] ** 0.5 / jnp.linalg.norm(noise, axis=-1, keepdims=True)
    moved = features + settings.sigma * length * noise
    return unit(moved) if settings.renormalize and settings.normalize == "l2" else moved


def initialise(rng: jax.Array, dim: int, classes: int, settings: Settings) -> Params:
    """First parameters: He's normal before the ReLU; the second map starts at zero.

    From zero every score is 0 (mlp), or the zero-shot one (residual).
    """
    hidden = settings.hidden or 2 * dim
    out = dim if settings.kind == "residual" else classes
    return {
        "w1": jax.random.normal(rng, (dim, hidden)) * (2 / dim) ** 0.5,
        "b1": jnp.zeros(hidden),
        "w2": jnp.zeros((hidden, out)),
        "b2": jnp.zeros(out),
    }


def scores(
    params: Params,
    features: Float[Array, "batch dim"],
    settings: Settings,
    prompts: Float[Array, "classes dim"] | None = None,
) -> Float[Array, "batch classes"]:
    """Scores of texts or images alike: W2 relu(W1 z + b1) + b2, or cosines after it.

    Args:
        params: of ``initialise`` or ``train``.
        features: rows as the settings normalise them.
        settings: the adapter's.
        prompts: features of the classes' names; ``residual`` needs them and takes others than it
            was trained with.
    """
    hidden = jax.nn.relu(features @ params["w1"] + params["b1"])
    out = hidden @ params["w2"] + params["b2"]
    if settings.kind == "mlp":
        return out
    if prompts is None:
        raise ValueError("a residual adapter scores against prompts: give them")
    adapted = (1 - settings.share) * unit(features) + settings.share * out
    return COSINE_SCALE * unit(adapted) @ unit(prompts).T


def train(
    features: Float[np.ndarray, "sentences dim"],
    labels: Sequence[Sequence[int]],
    classes: int,
    settings: Settings,
    prompts: Float[np.ndarray, "classes dim"] | None = None,
) -> Trained:
    """Fits an adapter to sentences.

    Targets are kept as lists of labels and spread out per batch, so ten thousand classes take no
    more memory than a batch of them.

    Args:
        features: of the sentences, as the settings normalise them.
        labels: of each sentence.
        classes: how many there are.
        settings: of the adapter and of its training.
        prompts: see ``scores``.

    Raises:
        UserError: fewer sentences than one, or labels that are none.
    """
    if not len(features) or len(features) != len(labels):
        raise UserError(f"labels train: {len(features)} sentences, {len(labels)} targets: give one")
    padded = padded_labels(labels, classes)
    length = jnp.float32(np.linalg.norm(features, axis=1).mean())
    data = jnp.asarray(features, jnp.float32), jnp.asarray(padded), length
    known = None if prompts is None else jnp.asarray(prompts, jnp.float32)
    rng = jax.random.key(settings.seed)
    params, losses = _train(rng, *data, known, classes, replace(settings, seed=0))
    found = np.asarray(losses)
    if not np.isfinite(found).all():
        raise UserError(
            f"labels train: the loss is no number with learning_rate={settings.learning_rate}: "
            "lower it"
        )
    return Trained(jax.tree.map(np.asarray, params), found)


def padded_labels(labels: Sequence[Sequence[int]], classes: int) -> Int[np.ndarray, "n most"]:
    """Label lists as one array, filled up with ``classes``, a class that is none."""
    most = max(map(len, labels))
    found = np.full((len(labels), max(most, 1)), classes, np.int32)
    for row, each in enumerate(labels):
        found[row, : len(each)] = list(each)
    if found.min() < 0 or found.max() > classes:
        raise UserError(f"labels: a label beyond {classes} classes: check the sentences")
    return found


def targets(padded: Int[Array, "batch most"], classes: int) -> Int[Array, "batch classes"]:
    """Label lists as ones among zeros."""
    rows = jnp.arange(len(padded))[:, None]
    return jnp.zeros((len(padded), classes + 1), jnp.int32).at[rows, padded].set(1)[:, :classes]


LOSSES = {
    "ranking": multilabel.ranking_loss,
    "asymmetric": multilabel.asymmetric_loss,
    "bce": multilabel.binary_cross_entropy,
}


@functools.partial(jax.jit, static_argnames=("classes", "settings"))
def _train(
    rng: Array,
    features: Array,
    padded: Array,
    length: Array,
    prompts: Array | None,
    classes: int,
    settings: Settings,
) -> tuple[Params, Array]:
    count = len(features)
    size = min(settings.batch, count)
    steps = -(-count // size)
    start, order_rng, noise_rng = jax.random.split(rng, 3)
    epochs = max(settings.epochs, -(-settings.least_steps // steps))
    optimiser = _optimiser(settings, epochs * steps)
    params = initialise(start, features.shape[1], classes, settings)

    def loss(params: Params, rows: Array, rng: Array) -> Array:
        seen = perturbed(features[rows], rng, settings, length)
        found = scores(params, seen, settings, prompts)
        return LOSSES[settings.loss](found, targets(padded[rows], classes))

    def step(carry: Any, at: tuple[Array, Array]) -> Any:
        params, state = carry
        rows, rng = at
        value, gradient = jax.value_and_grad(loss)(params, rows, rng)
        updates, state = optimiser.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    def epoch(carry: Any, number: Array) -> Any:
        order = jax.random.permutation(jax.random.fold_in(order_rng, number), count)
        order = jnp.resize(order, (steps, size))  # the last batch is filled from the first
        keys = jax.random.split(jax.random.fold_in(noise_rng, number), steps)
        carry, values = jax.lax.scan(step, carry, (order, keys))
        return carry, values.mean()

    (params, _), losses = jax.lax.scan(epoch, (params, optimiser.init(params)), jnp.arange(epochs))
    return params, losses


def _optimiser(settings: Settings, steps: int) -> optax.GradientTransformation:
    """AdamW with warm-up and a cosine to nothing; biases do not decay."""
    warm = max(1, round(settings.warmup * steps))
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, settings.learning_rate, warm, max(steps, warm + 1)
    )
    decayed = {"w1": True, "b1": False, "w2": True, "b2": False}
    return optax.adamw(schedule, weight_decay=settings.weight_decay, mask=decayed)


def unit(x: Array) -> Array:
    """Unit rows; a row of zeros stays one."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
