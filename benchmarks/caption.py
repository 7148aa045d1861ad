# SPDX-License-Identifier: Apache-2.0
"""Writing captions with and without a cache of keys and values: milliseconds per token.

    python benchmarks/caption.py [--tokens 32] [--batch 1 8]

Greedy, random weights, the demo's encoder width with a three-layer decoder over 197 image tokens (a
224-pixel image in patches of 16). Without a cache every token runs the decoder over the whole text,
as wide as it will get, since shapes are static. Rounds of the two alternate; medians are printed.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
from flax import nnx

from m2jax import config
from m2jax.models import generate
from m2jax.models import params as params_lib
from m2jax.models.generate import Search
from m2jax.models.heads import CaptionHead

MEMORY, VOCAB, ROUNDS = 197, 8192, 7


def without_cache(head, table, memory, language, tokens):
    """The same words, each from the decoder run on all of them."""

    def step(place, ids):
        states = head(table[ids[:, :-1]].astype(head.dtype), language, memory)
        logits = jnp.take_along_axis(states, place[None, None, None], 1)[:, 0] @ table.T
        return ids.at[:, place].set(logits.argmax(-1).astype(jnp.int32))

    return jax.lax.fori_loop(0, tokens, step, jnp.zeros((len(memory), tokens), jnp.int32))


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    args = parser.parse_args()
    cfg = config.resolve(
        config.Model(width=256, heads=4, max_text_len=args.tokens + 1, dtype="float32")
    )
    head = CaptionHead(nnx.Rngs(0), cfg, 3, 2)
    graph, state = nnx.split(head)
    table = jax.random.normal(jax.random.key(0), (VOCAB, 256)) / 16
    search = Search(length=args.tokens)

    @jax.jit
    def cached(state, memory, language):
        head = params_lib.bind(graph, state)
        # No word ends the text, so all tokens are written.
        return generate.write(
            head, table, memory, language,
            search=search, end=-1, vocab_size=VOCAB, rng=jax.random.key(0),
        ).ids  # fmt: skip

    @jax.jit
    def plain(state, memory, language):
        head = params_lib.bind(graph, state)
        return without_cache(head, table, memory, language, args.tokens)

    print("| batch | tokens | with cache ms/token | without | ratio | same words |")
    print("|---|---|---|---|---|---|")
    for batch in args.batch:
        memory = jax.random.normal(jax.random.key(1), (batch, MEMORY, 256))
        language = jnp.zeros(batch, jnp.int32)
        same = bool((cached(state, memory, language) == plain(state, memory, language)).all())
        times = {cached: [], plain: []}
        for _ in range(ROUNDS):
            for run, found in times.items():
                start = time.perf_counter()
                run(state, memory, language).block_until_ready()
                found.append((time.perf_counter() - start) * 1e3 / args.tokens)
        a, b = (statistics.median(found) for found in times.values())
        print(f"| {batch} | {args.tokens} | {a:.2f} | {b:.2f} | {b / a:.1f} | {same} |")


if __name__ == "__main__":
    main()
