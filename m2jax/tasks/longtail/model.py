# SPDX-License-Identifier: Apache-2.0
"""A classifier on frozen image features and side information, for classes on a long tail.

Features and fused side information go through a linear layer. Losses, re-sampling and metadata
dropout are the snake contest's; a frozen vision-language backbone in the place of its fine-tuned
ones is our choice, so that a recipe trains in a minute on a CPU.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from m2jax.config import UserError
from m2jax.losses import longtail, selfsup
from m2jax.tasks.longtail import fusion

Params = dict[str, Any]
PROJECTED = 64  # numbers that views are compared by
OVERSAMPLE = 0.1  # classes rarer than the one at which this share of all images is reached


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a classifier is made and trained."""

    side: Literal["none", "token", "dynamic"] = "dynamic"  # how metadata enters
    loss: Literal["plain", "adjusted", "effective", "seesaw", "poly"] = "adjusted"
    tau: float = 1.0  # of "adjusted"; 1 is balanced softmax
    keep: float = 1.0  # share of the hardest examples of a batch that count
    oversample: bool = False  # images of rare classes are repeated
    drop_side: bool = True  # hide metadata, from all examples at first to none at the end
    normalize: Literal["none", "l2"] = "none"  # of the image features
    epochs: int = 60
    batch: int = 256
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    smoothing: float = 0.1  # of labels
    contrast: float = 0.0  # weight of two views' contrast; the public code's is 0.001
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in get_type_hints(Settings).items():
            value = getattr(self, name)
            if get_args(choices) and value not in get_args(choices):
                raise UserError(f"{name}={value!r}: use one of {', '.join(get_args(choices))}")
        if not 0 < self.keep <= 1 or not 0 <= self.smoothing < 1:
            raise UserError("keep: above 0 and up to 1; smoothing: at least 0 and below 1")
        if self.epochs < 1 or self.batch < 1 or self.learning_rate <= 0:
            raise UserError("epochs, batch: at least 1; learning_rate: above 0")
        for name in ("tau", "contrast"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise UserError(f"{name}={getattr(self, name)}: must be a number not below 0")
        if not 0 <= self.seed < 2**31:
            raise UserError(f"seed={self.seed}: must be at least 0 and below 2^31")

    @property
    def trained_adjustment(self) -> bool:
        """Whether the classes' shares are in the loss: then they must not be taken off again."""
        return self.loss in ("adjusted", "effective", "seesaw")


class Pairs(NamedTuple):
    """Two views of images each, labelled or not."""

    features: Float[np.ndarray, "images 2 dim"] | Float[Array, "images 2 dim"]
    side: Float[np.ndarray, "images width"] | Float[Array, "images width"]


class Data(NamedTuple):
    """Training examples."""

    features: Float[np.ndarray, "images dim"]
    side: Float[np.ndarray, "images width"]
    labels: Int[np.ndarray, " images"]


def repeats(labels: Int[np.ndarray, " images"], classes: int) -> Int[np.ndarray, " images"]:
    """Rows of a training set with rare classes repeated (public code of 2207.11637).

    Counts are summed from the smallest; n is the count at which a tenth of all images is reached,
    and a class of fewer images m < n is there n // m + 1 times.
    """
    counts = np.bincount(labels, minlength=classes)
    ascending = np.sort(counts[counts > 0])
    enough = np.searchsorted(ascending.cumsum(), OVERSAMPLE * len(labels))
    n = int(ascending[min(enough, len(ascending) - 1)])
    times = np.where((counts > 0) & (counts < n), n // np.maximum(counts, 1) + 1, 1)
    return np.repeat(np.arange(len(labels)), times[labels])


def initialise(rng: Array, dim: int, width: int, classes: int, settings: Settings) -> Params:
    """First parameters; the classifier starts at zero."""
    params: Params = {
        "head": {"kernel": jnp.zeros((dim, classes)), "bias": jnp.zeros(classes)},
        "norm": {"scale": jnp.ones(dim), "bias": jnp.zeros(dim)},
    }
    if settings.side != "none":
        params |= fusion.initialise(rng, dim, width)
    if settings.side == "token":
        hidden = params["encoder"]["first"]["kernel"].shape[1]
        kernel = 0.01 * jax.random.normal(jax.random.fold_in(rng, 1), (hidden, dim))
        params["token"] = {"kernel": kernel}
        del params["fusion"]
    if settings.contrast:
        key = jax.random.fold_in(rng, 2)
        params["block"] = fusion.initialise_block(key, dim)
        params["project"] = {"kernel": dim**-0.5 * jax.random.normal(key, (dim, PROJECTED))}
    return params


def logits(
    params: Params,
    features: Float[Array, "batch dim"],
    side: Float[Array, "batch width"],
    settings: Settings,
) -> Float[Array, "batch classes"]:
    """Scores before any adjustment."""
    return fusion.linear(params["head"], body(params, features, side, settings))


def body(
    params: Params,
    features: Float[Array, "batch dim"],
    side: Float[Array, "batch width"],
    settings: Settings,
) -> Float[Array, "batch dim"]:
    """Features with their side information.

    ``token`` adds a map of the encoded side information to the feature: what a token of it does to
    a pooled feature at most, since the frozen backbone takes no further token.
    """
    x = fusion.layer_norm(params["norm"], features)
    if settings.side != "none":
        encoded = fusion.encode_side(params["encoder"], side)
        if settings.side == "dynamic":
            x = fusion.fuse(params["fusion"], x, encoded)
        else:
            x = x + fusion.linear(params["token"], encoded)
    return fusion.residual_norm(params["block"], x) if settings.contrast else x


def contrasted(params: Params, pairs: Pairs, settings: Settings) -> Float[Array, ""]:
    """SimCLR's loss and the hinge on the hardest negative, of two views of each image.

    As in the public code of 2207.11637, beside the labels' loss; there through a fine-tuned
    backbone, here through a residual block on frozen features, which is our choice.
    """
    count = len(pairs.side)
    features = jnp.asarray(pairs.features).swapaxes(0, 1).reshape(2 * count, -1)
    side = jnp.tile(jnp.asarray(pairs.side), (2, 1))
    x = body(params, features, side, settings)
    x = fusion.linear(params["project"], x)
    number = jnp.tile(jnp.arange(count), 2)
    return selfsup.info_nce(x, number) + selfsup.hardest_negative(x, number)


def train(data: Data, classes: int, settings: Settings, pairs: Pairs | None = None) -> Params:
    """Fits a classifier.

    Args:
        data: labelled examples.
        classes: how many there are.
        settings: of the classifier and of its training.
        pairs: for ``contrast``: views of training and of unlabelled images.

    Raises:
        UserError: no examples, no pairs for the contrast, or a loss that is no number.
    """
    if settings.contrast and (pairs is None or len(pairs.side) < 2):
        raise UserError(f"contrast={settings.contrast}: needs two images and more, in two views")
    if not len(data.labels):
        raise UserError("longtail train: no images: check the table")
    # A class without an image would get a prior of 1e-12 and never be pushed down.
    counts = np.maximum(np.bincount(data.labels, minlength=classes), 1)
    rows = np.arange(len(data.labels))
    if settings.oversample:
        rows = repeats(data.labels, classes)
    arrays = [jnp.asarray(each[rows]) for each in data]
    known = Pairs(*map(jnp.asarray, pairs)) if pairs is not None and settings.contrast else None
    params, losses = _train(*arrays, jnp.asarray(counts), known, classes, settings)
    if not np.isfinite(np.asarray(losses)).all():
        raise UserError("longtail train: the loss is no number: lower the learning rate")
    return jax.tree.map(np.asarray, params)


@functools.partial(jax.jit, static_argnames=("classes", "settings"))
def _train(
    features: Array,
    side: Array,
    labels: Array,
    counts: Array,
    pairs: Pairs | None,
    classes: int,
    settings: Settings,
) -> tuple[Params, Array]:
    total = len(labels)
    size = min(settings.batch, total)
    steps = -(-total // size)
    rng = jax.random.key(settings.seed)
    params = initialise(
        jax.random.fold_in(rng, 0), features.shape[1], side.shape[1], classes, settings
    )
    schedule = optax.cosine_decay_schedule(settings.learning_rate, settings.epochs * steps)
    optimiser = optax.adamw(
        schedule,
        weight_decay=settings.weight_decay,
        mask=lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree),
    )

    def loss(params: Params, rows: Array, hidden: Array, key: Array) -> Array:
        seen = side[rows]
        if settings.drop_side:
            seen = fusion.drop_side(seen, hidden, key)
        found = logits(params, features[rows], seen, settings)
        each = losses_of(found, labels[rows], counts, settings)
        value = longtail.hardest(each, settings.keep) if settings.keep < 1 else each.mean()
        if pairs is None:
            return value
        some = jax.random.permutation(key, len(pairs.side))[: settings.batch // 2]
        drawn = Pairs(pairs.features[some], pairs.side[some])
        return value + settings.contrast * contrasted(params, drawn, settings)

    def step(carry: Any, at: Any) -> Any:
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params, *at)
        updates, state = optimiser.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    def epoch(carry: Any, number: Array) -> Any:
        key = jax.random.fold_in(rng, number + 1)
        order = jnp.resize(jax.random.permutation(key, total), (steps, size))
        hidden = jnp.full(steps, 1 - number / settings.epochs)
        carry, values = jax.lax.scan(step, carry, (order, hidden, jax.random.split(key, steps)))
        return carry, values.mean()

    start = params, optimiser.init(params)
    (params, _), values = jax.lax.scan(epoch, start, jnp.arange(settings.epochs))
    return params, values


def losses_of(
    found: Float[Array, "batch classes"],
    labels: Int[Array, " batch"],
    counts: Int[Array, " classes"],
    settings: Settings,
) -> Float[Array, " batch"]:
    """The loss of each example as the settings name it."""
    if settings.loss == "seesaw":
        return longtail.seesaw(found, labels, counts)
    if settings.loss == "poly":
        return longtail.poly1(found, labels)
    adjustment: Array | float = 0.0
    if settings.loss == "adjusted":
        adjustment = longtail.log_prior(counts, settings.tau)
    elif settings.loss == "effective":
        adjustment = longtail.effective_log_prior(counts)
    classes = found.shape[-1]
    soft = jax.nn.one_hot(labels, classes) * (1 - settings.smoothing)
    return longtail.cross_entropy(found, soft + settings.smoothing / classes, adjustment)
