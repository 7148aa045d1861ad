# SPDX-License-Identifier: Apache-2.0
"""The baseline TaI-DPT (Guo et al. 2023): prompts with learned context, trained on sentences.

Two contexts shared by all classes: one for prompts that whole texts and images are compared with,
one for prompts that each token or patch is. Scales, temperatures and loss are those of the public
code; its SGD at 1e-4 was tuned for CLIP, so optimiser and rate here are our choice. An M2-Encoder
is needed: the context enters between [CLS] and the name.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from m2jax.bundle import Bundle
from m2jax.config import UserError
from m2jax.losses import multilabel
from m2jax.models import params as params_lib
from m2jax.models.m2 import POSITION_OFFSET, unit
from m2jax.models.multiway import ALL_A, ALL_B
from m2jax.models.params import Params
from m2jax.tasks.labels import adapter, features
from m2jax.tasks.labels.vocabulary import Vocabulary

SCALE = 4.0  # logits per cosine
TEXT_TEMPERATURE, IMAGE_TEMPERATURE = 50.0, 40.0  # of the weights of tokens, and of patches (COCO)
PADDING = -1e4  # in place of the cosine of a token that is none


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How contexts are trained."""

    context: int = 16  # tokens
    steps: int = 400
    batch: int = 64
    learning_rate: float = 2e-3
    seed: int = 0


class Tokens(NamedTuple):
    """Features of whole texts or images and of their tokens or patches; unit rows."""

    whole: Float[Array, "batch dim"]
    each: Float[Array, "batch tokens dim"]
    mask: Bool[Array, "batch tokens"]


class Prompts(NamedTuple):
    """Class features of the two contexts; unit rows."""

    whole: Float[Array, "classes dim"]
    each: Float[Array, "classes dim"]


def aggregate(
    tokens: Tokens, prompts: Prompts, temperature: float
) -> tuple[Float[Array, "batch classes"], Float[Array, "batch classes"]]:
    """Logits of the whole, and of the tokens weighted by how like the class each is.

    4 cos, and sum_l softmax_l(T cos_l) 4 cos_l (TaI-DPT, section 3.4); at test the mean of the two.
    """
    whole = SCALE * tokens.whole @ prompts.whole.T
    cosines = jnp.einsum("bld,cd->blc", tokens.each, prompts.each)
    cosines = jnp.where(tokens.mask[..., None], cosines, PADDING)
    weights = jax.nn.softmax(temperature * cosines, axis=1)
    local = (weights * SCALE * jnp.where(tokens.mask[..., None], cosines, 0.0)).sum(axis=1)
    return whole, local


def train(
    model: Bundle,
    words: Vocabulary,
    language: str,
    sentences: Sequence[str],
    labels: Sequence[Sequence[int]],
    recipe: Recipe,
) -> Prompts:
    """Learns the contexts; returns the classes' features with them.

    Raises:
        UserError: a model without patch features, or a context that leaves no room for names.
    """
    if not features.has_length(model):
        raise UserError("taidpt: needs features of patches: use an M2-Encoder")
    names = model.tokenize([each[language][0] for each in words.names])
    longest = int(names.mask.sum(axis=1).max())
    room = model.params["text_positions"].shape[0] - POSITION_OFFSET
    if longest + recipe.context > room:
        raise UserError(f"taidpt: {recipe.context} context tokens, {room - longest} fit: use fewer")
    classes = jnp.asarray(names.ids[:, :longest]), jnp.asarray(names.mask[:, :longest])
    ids, mask = model.tokenize(sentences)
    padded = adapter.padded_labels(labels, len(words))
    data = jnp.asarray(ids), jnp.asarray(mask), jnp.asarray(padded)
    found, losses = _train(model.graph, model.params, classes, data, recipe)
    if not np.isfinite(np.asarray(losses)).all():
        raise UserError("taidpt: the loss is no number: lower the learning rate")
    return found


def scores(
    model: Bundle, pixels: np.ndarray, prompts: Prompts, *, batch: int = 64
) -> Float[np.ndarray, "images classes"]:
    """Half global, half local scores of images."""
    parts = []
    for first in range(0, len(pixels), batch):
        part = jnp.asarray(pixels[first : first + batch])
        whole, each = model.encode_image(part), model.encode_patches(part)
        tokens = Tokens(whole, each, jnp.ones(each.shape[:2], bool))
        pair = aggregate(tokens, prompts, IMAGE_TEMPERATURE)
        parts.append(np.asarray((pair[0] + pair[1]) / 2, np.float32))
    return np.concatenate(parts)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _train(
    graph: nnx.GraphDef,
    params: Params,
    classes: tuple[Array, Array],
    data: tuple[Array, Array, Array],
    recipe: Recipe,
) -> tuple[Prompts, Array]:
    ids, mask, padded = data
    width = params["text_embed"].shape[1]
    rng = jax.random.key(recipe.seed)
    scale = jnp.std(params["text_embed"])
    contexts = scale * jax.random.normal(rng, (2, recipe.context, width))
    schedule = optax.cosine_decay_schedule(recipe.learning_rate, recipe.steps)
    optimiser = optax.adam(schedule)

    def loss(contexts: Array, rows: Array) -> Array:
        prompts = _class_features(graph, params, classes, contexts)
        tokens = jax.lax.stop_gradient(_text_tokens(graph, params, ids[rows], mask[rows]))
        truth = adapter.targets(padded[rows], len(classes[0]))
        pair = aggregate(tokens, prompts, TEXT_TEMPERATURE)
        return sum((multilabel.ranking_loss(each, truth) for each in pair), jnp.zeros(()))

    def step(carry: Any, number: Array) -> Any:
        contexts, state = carry
        key = jax.random.fold_in(rng, number + 1)
        rows = jax.random.randint(key, (min(recipe.batch, len(ids)),), 0, len(ids))
        value, gradient = jax.value_and_grad(loss)(contexts, rows)
        updates, state = optimiser.update(gradient, state, contexts)
        return (optax.apply_updates(contexts, updates), state), value

    start = contexts, optimiser.init(contexts)
    (contexts, _), losses = jax.lax.scan(step, start, jnp.arange(recipe.steps))
    return _class_features(graph, params, classes, contexts), losses


def _class_features(
    graph: nnx.GraphDef, params: Params, classes: tuple[Array, Array], contexts: Array
) -> Prompts:
    """Features of [CLS] context name, for each of the two contexts."""
    model = params_lib.bind(graph, params)
    ids, mask = classes
    words = model.text_embed[...][ids].astype(jnp.float32)
    length = ids.shape[1] + contexts.shape[1]
    places = model.text_positions[...][POSITION_OFFSET : POSITION_OFFSET + length]
    shown: Int[Array, "classes length"] = jnp.concatenate(
        [jnp.ones((len(ids), contexts.shape[1]), mask.dtype), mask], axis=1
    )

    def of(context: Array) -> Array:
        middle = jnp.broadcast_to(context, (len(ids), *context.shape))
        tokens = jnp.concatenate([words[:, :1], middle, words[:, 1:]], axis=1) + places
        tokens = model.backbone(tokens, split=ALL_B, token_mask=shown).tokens
        tokens = model.vl(tokens, split=ALL_A, token_mask=shown).tokens
        return unit(model.text_vl_head(tokens[:, 0]))

    return Prompts(of(contexts[0]), of(contexts[1]))


def _text_tokens(graph: nnx.GraphDef, params: Params, ids: Array, mask: Array) -> Tokens:
    model = params_lib.bind(graph, params)
    encoded = model.encode_text(ids, mask)
    each = unit(model.text_vl_head(encoded.vl.tokens[:, 1:]))
    return Tokens(encoded.features, each, mask[:, 1:] != 0)
