# SPDX-License-Identifier: Apache-2.0
"""Searches against exhaustive enumeration on a tiny decoder."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from m2jax import config
from m2jax.models import generate
from m2jax.models.generate import Search
from m2jax.models.heads import CaptionHead

VOCAB, END, LENGTH = 5, 3, 4
CFG = config.resolve(
    config.Model(
        width=16, heads=2, image_size=16, patch_size=8, vocab_size=VOCAB, max_text_len=LENGTH + 1,
        text_positions=10, out_dim=8, backbone_layers=1, vl_layers=1, dtype="float32",
    )
)  # fmt: skip


@pytest.fixture(scope="module")
def made():
    head = CaptionHead(nnx.Rngs(1), CFG, 2, 2)
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(8, 16)) / 2, jnp.float32)  # three rows are padding
    memory = jnp.asarray(rng.normal(size=(3, 5, 16)), jnp.float32)
    return head, table, memory, jnp.asarray([0, 1, 0])


@pytest.fixture(scope="module")
def talkative(made):
    """Slow to end; its words hang on the image and on those before. Twelve images."""
    head, table = CaptionHead(nnx.Rngs(1), CFG, 2, 2), made[1]
    memory = jnp.asarray(np.random.default_rng(1).normal(size=(12, 5, 16)), jnp.float32)
    # The first number of a state is mostly positive then; it speaks against the end alone.
    head.decoder.norm.bias[...] = jnp.zeros(16).at[0].set(1)
    # What comes next depends on the place and on all words before.
    head.text_positions[...] = 4 * head.text_positions[...]
    head.decoder.blocks.out.kernel[...] = 4 * head.decoder.blocks.out.kernel[...]
    table = table.at[:, 0].set(0).at[END].set(-jnp.eye(16)[0])
    return head, table, 2 * memory, jnp.arange(12) % 2


@functools.partial(jax.jit, static_argnums=0)
def _chances(graph, state, table, memory, language, words):
    states = nnx.merge(graph, state)(table[words], language, memory)
    return jax.nn.log_softmax(states @ table[:VOCAB].T)


def log_p(made, row, words):
    """log p of each word of a text, by the decoder run whole (it looks at no later word)."""
    head, table, memory, language = made
    filled = np.zeros((1, LENGTH - 1), np.int32)
    filled[0, : len(words) - 1] = words[:-1]
    one = memory[row][None], jnp.asarray([language[row]])
    chances = _chances(*nnx.split(head), table, *one, filled)[0]
    return np.asarray(chances)[np.arange(len(words)), list(words)]


def texts():
    """Every text of at most LENGTH words, ended or cut off."""
    for n in range(1, LENGTH + 1):
        for words in itertools.product([w for w in range(VOCAB) if w != END], repeat=n - 1):
            yield (*words, END)
    yield from itertools.product([w for w in range(VOCAB) if w != END], repeat=LENGTH)


def run(made, search, seed=0):
    head, table, memory, language = made
    return generate.write(
        head, table, memory, language,
        search=search, end=END, vocab_size=VOCAB, rng=jax.random.key(seed),
    )  # fmt: skip


def words_of(ids):
    """The text as ``texts`` writes it."""
    ids = list(map(int, ids))
    return tuple(ids[: ids.index(END) + 1] if END in ids else ids)


def test_greedy_takes_the_best_word_each_time(made):
    found = run(made, Search(length=LENGTH))
    for row in range(3):
        words = []
        while len(words) < LENGTH and (not words or words[-1] != END):
            best = max(range(VOCAB), key=lambda w, s=tuple(words): log_p(made, row, (*s, w))[-1])
            words.append(best)
        assert words_of(found.ids[row]) == tuple(words)
        np.testing.assert_allclose(
            found.log_probability[row], log_p(made, row, words).sum(), rtol=1e-5
        )


def scored(text, log_p, penalty):
    """A text that was cut off counts one word more: its end would have to come."""
    words = len(text) + (text[-1] != END)
    return log_p / ((5 + words) / 6) ** penalty


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_a_wide_beam_finds_the_best_text_of_all(talkative, penalty):
    search = Search("beam", length=LENGTH, beams=VOCAB**LENGTH, length_penalty=penalty)
    head, table, memory, language = talkative
    found = run((head, table, memory[:3], language[:3]), search)
    for row in range(3):
        total = {t: log_p(talkative, row, t).sum() for t in texts()}
        best = max(total, key=lambda text, of=total: scored(text, of[text], penalty))
        assert words_of(found.ids[row]) == best
        np.testing.assert_allclose(found.log_probability[row], total[best], rtol=1e-5)


@pytest.mark.parametrize("beams", [2, 3])
def test_a_narrow_beam_keeps_the_best_prefixes_of_its_image(talkative, beams):
    """Against the same search written plainly, one image at a time."""
    found = run(talkative, Search("beam", length=LENGTH, beams=beams, length_penalty=0.6))
    greedy = run(talkative, Search(length=LENGTH))
    assert (found.ids != greedy.ids).any(1).sum() > 2  # or one prefix would do
    for row in range(12):
        kept = {(): 0.0}
        for _ in range(LENGTH):
            grown = {t: p for t, p in kept.items() if t and t[-1] == END}
            for text, total in kept.items():
                if text not in grown:
                    for word in range(VOCAB):
                        longer = (*text, word)
                        grown[longer] = total + log_p(talkative, row, longer)[-1]
            kept = dict(sorted(grown.items(), key=lambda item: -item[1])[:beams])
        best = max(kept, key=lambda text, of=kept: scored(text, of[text], 0.6))
        assert words_of(found.ids[row]) == best
        np.testing.assert_allclose(found.log_probability[row], kept[best], rtol=1e-5)


def test_of_equal_words_the_first_is_taken():
    rng = np.random.default_rng(0)
    x = rng.integers(-3, 4, (50, 20)).astype(np.float32)
    x[3], x[4, 5:] = -np.inf, -np.inf
    np.testing.assert_array_equal(generate._largest(jnp.asarray(x)), x.argmax(1))


def test_one_beam_is_greedy(made):
    a, b = run(made, Search(length=LENGTH)), run(made, Search("beam", length=LENGTH, beams=1))
    np.testing.assert_array_equal(a.ids, b.ids)
    np.testing.assert_allclose(a.log_probability, b.log_probability, rtol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_the_nucleus_leaves_out_its_tail_and_samples_the_rest_by_chance(made, temperature):
    head, table, memory, _ = made
    top_p, drawn = 0.7, 2000
    same = (head, table, jnp.repeat(memory[:1], drawn, 0), jnp.zeros(drawn, jnp.int32))
    search = Search("nucleus", length=1, top_p=top_p, temperature=temperature)
    found = run(same, search)
    chances = np.exp([log_p(made, 0, (w,))[0] / temperature for w in range(VOCAB)])
    chances /= chances.sum()
    order = np.argsort(-chances)
    count = int((np.cumsum(chances[order]) - chances[order] < top_p).sum())
    kept = order[:count]
    seen = np.bincount(np.asarray(found.ids)[:, 0], minlength=VOCAB) / drawn
    assert set(np.flatnonzero(seen)) == set(kept)
    expected = chances[kept] / chances[kept].sum()
    assert np.abs(seen[kept] - expected).max() < 4 * np.sqrt(0.25 / drawn)


def test_a_tiny_nucleus_is_greedy(made):
    a, b = run(made, Search(length=LENGTH)), run(made, Search("nucleus", LENGTH, top_p=1e-6))
    np.testing.assert_array_equal(a.ids, b.ids)


def test_past_the_longest_text_of_training_the_last_position_serves(made):
    head, table, memory, language = made
    found = run(made, Search(length=LENGTH + 3))
    ids = jnp.minimum(found.ids, VOCAB - 1)
    tags = head.language_tags[...][language][:, None]
    tokens = jnp.concatenate([tags, table[ids[:, :-1]]], axis=1)
    places = jnp.minimum(jnp.arange(LENGTH + 3), LENGTH)
    states = head.decoder(tokens + head.text_positions[...][places], memory)
    chances = jax.nn.log_softmax(states @ table[:VOCAB].T)
    each = np.take_along_axis(np.asarray(chances), np.asarray(ids)[..., None], 2)[..., 0]
    assert (found.ids == END).sum() < found.ids.size  # some text is long
    for row, words in enumerate(map(words_of, found.ids)):
        np.testing.assert_allclose(
            found.log_probability[row], each[row, : len(words)].sum(), rtol=1e-5
        )


def test_the_language_and_the_memory_are_read(made):
    head, table, memory, _ = made
    found = [
        np.asarray(run((head, table, m, jnp.full(3, tag)), Search(length=LENGTH)).log_probability)
        for m, tag in ((memory, 0), (memory, 1), (memory[::-1], 0))
    ]
    assert (np.abs(found[0] - found[1]) > 1e-4).all()
    assert np.abs(found[0] - found[2]).max() > 1e-4
