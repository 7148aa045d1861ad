# SPDX-License-Identifier: Apache-2.0
"""A classifier on frozen image features and side information, for classes on a long tail.

Features and fused side information go through a linear layer. Losses, re-sampling and metadata
dropout are the snake contest's; a frozen vision-language backbone in the place of its fine-tuned
ones is our choice, so that a recipe trains in a minute on a CPU.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
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
MOMENTUM = 0.99  # of MoCo-v3's slow encoder at first; 1 at the end
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
    block: bool = False  # a residual block on the features; a contrast always has one
    contrast: float = 0.0  # weight of two views' contrast; the public code's is 0.001
    contrast_by: Literal["simclr", "moco"] = "simclr"
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
    def has_block(self) -> bool:
        """Whether a residual block is trained on the features: views are contrasted behind it."""
        return self.block or self.contrast > 0

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
    if settings.side == "dynamic":
        params |= fusion.initialise(rng, dim, width)
    elif settings.side == "token":
        params |= fusion.initialise_token(jax.random.fold_in(rng, 1), dim, width)
    key = jax.random.fold_in(rng, 2)
    if settings.has_block:
        params["block"] = fusion.initialise_block(key, dim)
    if settings.contrast:
        params["project"] = {"kernel": dim**-0.5 * jax.random.normal(key, (dim, PROJECTED))}
    if settings.contrast and settings.contrast_by == "moco":
        params["predict"] = fusion.initialise_block(jax.random.fold_in(rng, 3), PROJECTED)
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

    ``token`` encodes it as MetaFormer does (spec of 2207.11637's backbone), but there the token
    goes through two stages of attention beside the patches and here a map of it is added to the
    feature: our choice, since the frozen backbone takes no further token.
    """
    x = fusion.layer_norm(params["norm"], features)
    if settings.side == "dynamic":
        x = fusion.fuse(params["fusion"], x, fusion.encode_side(params["encoder"], side))
    elif settings.side == "token":
        x = x + fusion.linear(params["token"], fusion.encode_token(params["encoder"], side))
    return fusion.residual_norm(params["block"], x) if settings.has_block else x


def contrasted(
    params: Params, pairs: Pairs, settings: Settings, slow: Params | None = None
) -> Float[Array, ""]:
    """The contrast of two views of each image.

    ``simclr``: its loss and the hinge on the hardest negative, as in the public code of 2207.11637,
    beside the labels' loss. ``moco``: MoCo-v3's symmetric loss of predicted queries and the slow
    encoder's keys; there it pretrains the backbone. In both the backbone is trained in the public
    code; here a residual block on frozen features is, and the prediction is such a block: our
    choice.

    Args:
        params: of the classifier.
        pairs: the views.
        settings: name the loss.
        slow: the momentum encoder's parameters, which get no gradient; ``moco``.
    """
    count = len(pairs.side)
    number = jnp.tile(jnp.arange(count), 2)
    x = _projected(params, pairs, settings)
    if settings.contrast_by == "simclr":
        return selfsup.info_nce(x, number) + selfsup.hardest_negative(x, number)
    if slow is None:
        raise ValueError("moco: needs the parameters of the slow encoder")
    keys = _projected(slow, pairs, settings)
    queries = fusion.residual_norm(params["predict"], x)
    return selfsup.moco_v3(queries[:count], keys[count:]) + selfsup.moco_v3(
        queries[count:], keys[:count]
    )


def _projected(params: Params, pairs: Pairs, settings: Settings) -> Float[Array, "rows dim"]:
    """All first views, then all second ones."""
    count = len(pairs.side)
    features = jnp.asarray(pairs.features).swapaxes(0, 1).reshape(2 * count, -1)
    x = body(params, features, jnp.tile(jnp.asarray(pairs.side), (2, 1)), settings)
    return fusion.linear(params["project"], x)


def followed(slow: Params, params: Params, progress: Array | float) -> Params:
    """The slow encoder after a step: m slow + (1 - m) params, m from .99 to 1 by half a cosine.

    Args:
        slow: its parameters.
        params: those that the step gave.
        progress: share of the training that is over, 0 to 1.
    """
    m = 1 - (1 - MOMENTUM) * (1 + jnp.cos(jnp.pi * progress)) / 2
    return jax.tree.map(lambda a, b: m * a + (1 - m) * b, slow, params)


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
    rng = jax.random.key(settings.seed)
    params, losses = _train(
        rng, *arrays, jnp.asarray(counts), known, classes, replace(settings, seed=0)
    )
    if not np.isfinite(np.asarray(losses)).all():
        raise UserError("longtail train: the loss is no number: lower the learning rate")
    return jax.tree.map(np.asarray, params)


@functools.partial(jax.jit, static_argnames=("classes", "settings"))
def _train(
    rng: Array,
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
    params = initialise(
        jax.random.fold_in(rng, 0), features.shape[1], side.shape[1], classes, settings
    )
    schedule = optax.cosine_decay_schedule(settings.learning_rate, settings.epochs * steps)
    optimiser = optax.adamw(
        schedule,
        weight_decay=settings.weight_decay,
        mask=lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree),
    )

    moco = pairs is not None and settings.contrast_by == "moco"

    def loss(params: Params, slow: Params | None, rows: Array, hidden: Array, key: Array) -> Array:
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
        return value + settings.contrast * contrasted(params, drawn, settings, slow)

    def step(carry: Any, at: Any) -> Any:
        params, slow, state, done = carry
        value, gradient = jax.value_and_grad(loss)(params, slow, *at)
        updates, state = optimiser.update(gradient, state, params)
        moved: Any = optax.apply_updates(params, updates)
        if moco:
            slow = followed(slow, moved, done / (settings.epochs * steps))
        return (moved, slow, state, done + 1), value

    def epoch(carry: Any, number: Array) -> Any:
        key = jax.random.fold_in(rng, number + 1)
        order = jnp.resize(jax.random.permutation(key, total), (steps, size))
        hidden = jnp.full(steps, 1 - number / settings.epochs)
        carry, values = jax.lax.scan(step, carry, (order, hidden, jax.random.split(key, steps)))
        return carry, values.mean()

    start = params, params if moco else None, optimiser.init(params), 0
    (params, *_), values = jax.lax.scan(epoch, start, jnp.arange(settings.epochs))
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
