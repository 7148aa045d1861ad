# SPDX-License-Identifier: Apache-2.0
"""Full fine-tuning of a classifier: the image encoder and a linear head, all of it trained.

A short loop of its own: the trainer pretrains, and lies above evaluation. The devices of a bundle
share its batches. The head starts at zero on unit features, so the first step moves the head alone.
"""

from __future__ import annotations

import functools
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Int

from m2jax import optim
from m2jax.bundle import Bundle
from m2jax.config import Optim, UserError
from m2jax.dist.sharding import batch_shards, spread
from m2jax.eval import metrics as metrics_lib
from m2jax.eval.emoji import Encoder
from m2jax.eval.features import READERS
from m2jax.eval.sets.records import Images
from m2jax.models import params as params_lib
from m2jax.models.params import Params

HEAD_SCALE = 20.0  # logits per unit of the head: features are unit rows


class Recipe(NamedTuple):
    """How it is trained."""

    epochs: int = 10
    batch: int = 64
    learning_rate: float = 1e-4
    weight_decay: float = 0.05
    warmup: float = 0.1  # of all steps
    smoothing: float = 0.1  # of labels
    flip: bool = True  # left and right, half of the time
    seed: int = 0


class Tuned(NamedTuple):
    """A classifier."""

    params: Params  # of the encoder
    head: Params
    losses: list[float]  # of each step


def train(
    model: Encoder,
    images: Images,
    labels: Int[np.ndarray, " images"],
    classes: int,
    *,
    recipe: Recipe | None = None,
    show: bool = False,
) -> Tuned:
    """Trains on all pictures for some epochs; AdamW, cosine schedule, smoothed labels.

    Args:
        model: a bundle, where its parameters start.
        images: the training pictures.
        labels: of each picture.
        classes: number of classes.
        recipe: how; the defaults if not given.
        show: say on the terminal how far it is.

    Raises:
        UserError: the model is no bundle, or a picture cannot be read.
    """
    if not isinstance(model, Bundle):
        raise UserError("fine-tune: needs a model from m2jax.load: name a model folder")
    recipe = recipe or Recipe()
    batch = min(recipe.batch, len(images))
    steps = recipe.epochs * (len(images) // batch)
    rules = Optim(
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        warmup_steps=int(recipe.warmup * steps),
        end_factor=0.0,
    )
    dim = model.encode_image(_pixels(model, images, 0)[None]).shape[-1]
    params = {
        "encoder": model.params,
        "head": {"kernel": jnp.zeros((dim, classes)), "bias": jnp.zeros(classes)},
    }
    transform = optim.make_optimizer(rules, steps, frozen=_unread).transform
    step = _step(model.graph, transform, recipe.smoothing)
    state, losses = jax.jit(transform.init)(params), []
    params = jax.tree.map(jnp.copy, params)  # the step gives its input away; the bundle stays whole
    rng = np.random.default_rng(recipe.seed)
    with ThreadPoolExecutor(READERS) as pool:
        for _ in range(recipe.epochs):
            order = rng.permutation(len(images))
            for first in range(0, len(images) - batch + 1, batch):
                rows = order[first : first + batch]
                pixels = np.stack(list(pool.map(lambda r: _pixels(model, images, int(r)), rows)))
                if recipe.flip:
                    mirrored = rng.random(batch) < 0.5
                    pixels[mirrored] = pixels[mirrored, :, ::-1]
                params, state, loss = step(params, state, _placed(model, pixels), labels[rows])
                losses.append(float(loss))
                if show:
                    text = f"\rstep {len(losses)}/{steps} loss {losses[-1]:.3f}"
                    print(text, end="", file=sys.stderr, flush=True)
    if show:
        print(file=sys.stderr)
    if not np.isfinite(losses[-1]):
        raise UserError("fine-tune: the loss is not a number: lower --learning-rate")
    return Tuned(params["encoder"], params["head"], losses)


def ranks(
    tuned: Tuned,
    model: Bundle | Encoder,
    images: Images,
    labels: Int[np.ndarray, " images"],
    *,
    batch: int,
) -> Int[np.ndarray, " images"]:
    """Rank of the true class of each picture, from 0."""
    assert isinstance(model, Bundle)
    found, batch = [], min(batch, len(images))
    for first in range(0, len(images), batch):
        rows = [min(i, len(images) - 1) for i in range(first, first + batch)]  # one shape
        pixels = np.stack([_pixels(model, images, row) for row in rows])
        placed = pixels if model.mesh is None else spread(pixels, model.mesh)
        logits = np.asarray(_logits(model.graph, tuned.params, tuned.head, placed))
        count = min(batch, len(images) - first)
        right = labels[first : first + count, None] == np.arange(logits.shape[1])
        found.append(metrics_lib.first_right(logits[:count], right))
    return np.concatenate(found)


def _unread(name: str) -> bool:
    """Parameters that no image feature depends on: the text tower and what only training reads."""
    name = name.removeprefix("encoder.")
    parts = ("text", "norm.", "pooler.", "logit", "image_head.", "vision_embed.mask_token")
    return name.startswith(parts) or ".B." in name


def _placed(model: Bundle, pixels: np.ndarray) -> jax.Array | np.ndarray:
    """A batch of training on the devices; whole on each where they do not divide it.

    A filled one would count its last row several times.
    """
    mesh = model.mesh
    if mesh is None or len(pixels) % batch_shards(mesh.shape):
        return pixels
    return spread(pixels, mesh)


def _pixels(model: Bundle, images: Images, row: int) -> np.ndarray:
    return model.preprocess([images.read(row)])[0]


@functools.partial(jax.jit, static_argnums=0)
def _logits(graph, params, head, pixels) -> jax.Array:
    features = params_lib.bind(graph, params).encode_image(pixels).features
    return HEAD_SCALE * features @ head["kernel"] + head["bias"]


def _step(graph, transform, smoothing):
    """One update, compiled."""

    def loss(params, pixels, labels):
        logits = _logits(graph, params["encoder"], params["head"], pixels)
        wanted = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[1]), smoothing)
        return optax.softmax_cross_entropy(logits, wanted).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, pixels, labels):
        value, grads = jax.value_and_grad(loss)(params, pixels, labels)
        updates, state = transform.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return step
