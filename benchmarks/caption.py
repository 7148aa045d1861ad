# SPDX-License-Identifier: Apache-2.0
"""Writing captions with and without a cache of keys and values: milliseconds per token.

    python benchmarks/caption.py [--tokens 32] [--batch 1 8 32] [--methods greedy beam]
                                 [--vocab 8192] [--width 256] [--rounds 7]

Random weights, by default the demo's encoder width with a three-layer decoder over 197 image tokens
(a 224-pixel image in patches of 16). Every form runs the same search. Beside the cache:

- ``nothing kept``: every token runs the decoder over the whole text and the image, the text as wide
  as it will get, since shapes are static; this is the ratio that the issue asks for;
- ``image kept``: the image's keys and values are computed once, and the text is run again no wider
  than the next of four widths: as good as it gets without a cache of the text.

Rounds of the three alternate; medians are printed, and the spread of the ratios of single rounds.
"""

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp
from flax import nnx

from m2jax import config
from m2jax.models import generate, layers
from m2jax.models import params as params_lib
from m2jax.models.generate import Search
from m2jax.models.heads import CaptionHead
from m2jax.models.stepwise import Stepper

MEMORY, LAYERS, WIDTHS = 197, 3, 4


def again(states, head, table, memory, language, search):
    """A search whose past is the text: ``states`` runs the decoder over all of it."""
    rows = search.beams if search.method == "beam" else 1
    many = jnp.repeat(memory, rows, axis=0), jnp.repeat(language, rows)

    def following(ids, word, place):
        ids = jax.lax.dynamic_update_index_in_dim(ids, word, place, 1)
        return ids, generate.word_chances(states(ids, place + 1, *many), table, len(table))

    nothing = jnp.zeros((len(memory), search.length), jnp.int32)
    first = generate.word_chances(states(nothing, 0, memory, language), table, len(table))
    return generate.choose(
        following, nothing, first, search=search, end=-1, rng=jax.random.key(0)
    ).ids


def nothing_kept(head, table, memory, language, search):
    """The decoder as it is trained, run for every token."""

    def states(ids, place, memory, language):
        found = head(table[ids], language, memory)
        return jax.lax.dynamic_index_in_dim(found, place, 1, keepdims=False)

    return again(states, head, table, memory, language, search)


def image_kept(head, table, memory, language, search):
    """Every token runs the text alone, in as much room as it needs."""
    stepper, decoder = Stepper(head.decoder, memory), head.decoder
    kept = [[x.swapaxes(1, 2) for x in (k.swapaxes(2, 3), v)] for k, v in stepper.memory]

    def run(width, ids, language):
        tags = head.language_tags[...][language][:, None]
        x = jnp.concatenate([tags, table[ids[:, : width - 1]]], axis=1)
        x = x + head.text_positions[...][:width]
        order = jnp.arange(width)
        bias = jnp.where(order[:, None] >= order, 0.0, -jnp.inf)[None, None]
        for block, pairs in zip(stepper.blocks, kept, strict=True):
            attended = layers.attention(*block.project(x), bias=bias)
            x, asked = block.ask(x, attended)
            # The beams of an image ask its keys and values together.
            together = asked.reshape(len(memory), -1, *asked.shape[2:])
            x = block.answer(x, layers.attention(together, *pairs).reshape(asked.shape))
        states = decoder.norm(x)
        return jnp.pad(states, ((0, 0), (0, search.length + 1 - width), (0, 0)))

    step = -(-(search.length + 1) // WIDTHS)
    widths = [min(step * (i + 1), search.length + 1) for i in range(WIDTHS)]
    runs = [functools.partial(run, width) for width in widths]

    def states(ids, place, _, language):
        found = jax.lax.switch(place // step, runs, ids, language)
        return jax.lax.dynamic_index_in_dim(found, place, 1, keepdims=False)

    return again(states, head, table, memory, language, search)


def cached(head, table, memory, language, search):
    """What the library does. No word ends the text, so all tokens are written."""
    return generate.write(
        head, table, memory, language,
        search=search, end=-1, vocab_size=len(table), rng=jax.random.key(0),
    ).ids  # fmt: skip


def measure(method, batch, args):
    """One line of the table."""
    sizes = {"width": args.width, "heads": args.width // 64, "max_text_len": args.tokens + 1}
    cfg = config.resolve(config.Model(**sizes, dtype="float32"))
    graph, state = nnx.split(CaptionHead(nnx.Rngs(0), cfg, LAYERS, 2))
    table = jax.random.normal(jax.random.key(0), (args.vocab, args.width)) * args.width**-0.5
    memory = jax.random.normal(jax.random.key(1), (batch, MEMORY, args.width))
    search, language = Search(method, length=args.tokens), jnp.zeros(batch, jnp.int32)

    def compiled(form):
        def run(state, table, memory, language):
            return form(params_lib.bind(graph, state), table, memory, language, search)

        return jax.jit(run)

    forms = [compiled(form) for form in (cached, nothing_kept, image_kept)]
    given = state, table, memory, language
    texts = [run(*given) for run in forms]
    same = all((text == texts[0]).all() for text in texts)
    times = [[] for _ in forms]
    for _ in range(args.rounds):
        for run, found in zip(forms, times, strict=True):
            start = time.perf_counter()
            run(*given).block_until_ready()
            found.append((time.perf_counter() - start) * 1e3 / args.tokens)
    cells = [f"{statistics.median(found):.2f}" for found in times]
    for other in times[1:]:
        ratios = sorted(b / a for a, b in zip(times[0], other, strict=True))
        cells.append(f"{statistics.median(ratios):.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f})")
    return [method, str(batch), *cells, "yes" if same else "NO"]


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--methods", nargs="+", default=["greedy", "beam"])
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    names = ["search", "batch", "cache ms/token", "nothing kept", "image kept"]
    names += ["nothing kept / cache", "image kept / cache", "same words"]
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for method in args.methods:
        for batch in args.batch:
            print("| " + " | ".join(measure(method, batch, args)) + " |", flush=True)


if __name__ == "__main__":
    main()
