# SPDX-License-Identifier: Apache-2.0
"""Writing captions word by word: greedy, nucleus (sampling) and beam search, on a cache.

Every loop has static shapes and stops as soon as all texts have ended. Positions after the end hold
the end token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from m2jax.models.heads import CaptionHead
from m2jax.models.stepwise import Past

METHODS = ("greedy", "nucleus", "beam")


class Written(NamedTuple):
    """Texts and how likely the model finds them."""

    ids: Int[Array, "batch length"]
    log_probability: Float[Array, " batch"]  # natural logarithm, of the words and the end


class Search(NamedTuple):
    """How words are chosen; hashable, so a compiled search is kept per setting."""

    method: str = "greedy"
    length: int = 32  # most words, the end included
    beams: int = 4  # beam
    length_penalty: float = 0.6  # beam: log p / ((5 + words) / 6) ** penalty (Wu et al. 2016, 14)
    top_p: float = 0.9  # nucleus: least set of words with this mass (Holtzman et al. 2020)
    temperature: float = 1.0  # nucleus: divides the logits


# Past, one more word [rows], how many were before it -> past, log p [rows, vocab]. A past is any
# tree of arrays whose first axis is the rows.
Next = Callable[[Any, jax.Array, jax.Array], tuple[Any, jax.Array]]


def write(
    head: CaptionHead,
    table: Float[Array, "vocab width"],
    memory: Float[Array, "batch memory width"],
    language: Int[Array, " batch"],
    *,
    search: Search,
    end: int,
    vocab_size: int,
    rng: jax.Array,
) -> Written:
    """Writes a text about every memory.

    Args:
        head: the trained decoder.
        table: token embedding, which also predicts.
        memory: image tokens.
        language: index of each text's tag.
        search: how words are chosen.
        end: id of the token that ends a text.
        vocab_size: rows of the table that are words.
        rng: for nucleus.
    """
    words = table.astype(head.dtype)
    stepper, past, state = head.begin(memory, language, search.length + 1)

    def following(past: Past, word: jax.Array, place: jax.Array) -> tuple[Past, jax.Array]:
        past, state = head.advance(stepper, past, words[word], place + 1)
        return past, word_chances(state, words, vocab_size)

    first = word_chances(state, words, vocab_size)
    return choose(following, past, first, search=search, end=end, rng=rng)


def word_chances(
    state: Float[Array, "rows width"], table: Float[Array, "vocab width"], vocab_size: int
) -> Float[Array, "rows vocab"]:
    """Log p of every word behind a state; none for the rows of the table that are no words."""
    wide = jnp.promote_types(state.dtype, jnp.float32)
    logits = jnp.matmul(state, table.astype(state.dtype).T, preferred_element_type=wide)
    return jax.nn.log_softmax(jnp.where(jnp.arange(len(table)) < vocab_size, logits, -jnp.inf))


def choose(
    following: Next,
    past: Any,
    first: Float[Array, "batch vocab"],
    *,
    search: Search,
    end: int,
    rng: jax.Array,
) -> Written:
    """The search itself, whatever tells the words' chances.

    Args:
        following: the chances behind one more word.
        past: before the first word.
        first: log p of the first word.
        search: how words are chosen.
        end: id of the token that ends a text.
        rng: for nucleus.
    """
    if search.method == "beam":
        return _beam(following, past, first, search, end)
    return _sample(following, past, first, search, end, rng)


def _sample(
    following: Next, past: Any, first: jax.Array, search: Search, end: int, rng: jax.Array
) -> Written:
    """Greedy or nucleus: one word after the other."""
    batch = len(first)
    ids = jnp.full((batch, search.length), end, jnp.int32)

    def unfinished(carry: Any) -> jax.Array:
        place, _, _, _, _, ended = carry
        return (place < search.length) & ~ended.all()

    def step(carry: Any) -> Any:
        place, past, log_p, ids, total, ended = carry
        word = _choose(log_p, search, jax.random.fold_in(rng, place))
        word = jnp.where(ended, end, word)
        gained = jnp.take_along_axis(log_p, word[:, None], 1)[:, 0]
        total = total + jnp.where(ended, 0, gained)
        ids = lax.dynamic_update_index_in_dim(ids, word, place, 1)
        past, log_p = following(past, word, place)
        return place + 1, past, log_p, ids, total, ended | (word == end)

    start = (
        jnp.asarray(0),
        past,
        first,
        ids,
        jnp.zeros(batch, first.dtype),
        jnp.zeros(batch, bool),
    )
    _, _, _, ids, total, _ = lax.while_loop(unfinished, step, start)
    return Written(ids, total)


def _choose(log_p: jax.Array, search: Search, rng: jax.Array) -> jax.Array:
    if search.method == "greedy":
        return _largest(log_p)
    scaled = jax.nn.log_softmax(log_p / search.temperature)
    order = jnp.argsort(-scaled, axis=-1)
    sorted_p = jnp.take_along_axis(jnp.exp(scaled), order, -1)
    before = jnp.cumsum(sorted_p, -1) - sorted_p  # mass of the likelier words
    kept = jnp.where(before < search.top_p, jnp.log(sorted_p), -jnp.inf)
    picked = jax.random.categorical(rng, kept)
    return jnp.take_along_axis(order, picked[:, None], -1)[:, 0].astype(jnp.int32)


def _largest(x: Float[Array, "rows vocab"]) -> Int[Array, " rows"]:
    """``argmax``, the first of equals, in two plain reductions.

    One over pairs of value and index is not vectorised on a CPU: 1.2 ms for 32 rows of 8,192
    against 0.16.
    """
    places = jnp.arange(x.shape[1], dtype=jnp.int32)
    return jnp.where(x == x.max(1, keepdims=True), places, x.shape[1] - 1).min(1)


def _beam(following: Next, past: Any, first: jax.Array, search: Search, end: int) -> Written:
    """The most likely texts found by extending ``beams`` prefixes at a time."""
    batch, vocab = first.shape
    beams, length = search.beams, search.length
    past = jax.tree.map(lambda x: jnp.repeat(x, beams, axis=0), past)
    total = jnp.full((batch, beams), -jnp.inf, first.dtype).at[:, 0].set(0)  # one prefix: none
    log_p = jnp.repeat(first, beams, axis=0)
    ids = jnp.full((batch, beams, length), end, jnp.int32)
    # A text that has ended goes on in one way, at no cost, so that it keeps its place.
    only_end = jnp.where(jnp.arange(vocab) == end, 0.0, -jnp.inf)

    def unfinished(carry: Any) -> jax.Array:
        place, _, _, _, _, ended = carry
        return (place < length) & ~ended.all()

    def step(carry: Any) -> Any:
        place, past, log_p, ids, total, ended = carry
        steps = jnp.where(ended[..., None], only_end, log_p.reshape(batch, beams, vocab))
        total, flat = lax.top_k((total[..., None] + steps).reshape(batch, -1), beams)
        parent, word = flat // vocab, (flat % vocab).astype(jnp.int32)
        ids = jnp.take_along_axis(ids, parent[..., None], 1).at[:, :, place].set(word)
        ended = jnp.take_along_axis(ended, parent, 1) | (word == end)
        rows = (jnp.arange(batch)[:, None] * beams + parent).reshape(-1)
        past = jax.tree.map(lambda x, rows=rows: x[rows], past)
        past, log_p = following(past, word.reshape(-1), place)
        return place + 1, past, log_p, ids, total, ended

    start = (jnp.asarray(0), past, log_p, ids, total, jnp.zeros((batch, beams), bool))
    _, _, _, ids, total, _ = lax.while_loop(unfinished, step, start)
    words = (ids != end).sum(-1) + 1
    score = total / ((5 + words) / 6) ** search.length_penalty
    best = score.argmax(1)
    return Written(
        jnp.take_along_axis(ids, best[:, None, None], 1)[:, 0],
        jnp.take_along_axis(total, best[:, None], 1)[:, 0],
    )
