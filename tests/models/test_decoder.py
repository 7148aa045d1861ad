# SPDX-License-Identifier: Apache-2.0
"""What a decoder's token may depend on, and that a cache changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from m2jax import config
from m2jax.models.decoder import Decoder
from m2jax.models.stepwise import Stepper

CFG = config.resolve(
    config.Model(
        width=16, heads=2, image_size=16, patch_size=8, vocab_size=50, max_text_len=8,
        text_positions=10, out_dim=8, backbone_layers=1, vl_layers=1, dtype="float32",
    )
)  # fmt: skip


def arrays(seed=0, length=6, memory=5):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(2, length, 16)), rng.normal(size=(2, memory, 16))


@pytest.fixture
def wide():
    with jax.enable_x64(True):
        yield


def decoder(*, causal):
    made = Decoder(nnx.Rngs(0), CFG, 3, causal=causal)
    return nnx.merge(*(jax.tree.map(_wide, part) for part in nnx.split(made)))


def _wide(x):
    return x.astype(jnp.float64) if isinstance(x, jax.Array) else x


@pytest.mark.parametrize("causal", [True, False])
def test_a_token_sees_what_it_may(wide, causal):
    tokens, memory = arrays()
    run = decoder(causal=causal)
    before = np.asarray(run(jnp.asarray(tokens), jnp.asarray(memory)))
    changed = tokens.copy()
    changed[:, 3] = arrays(1)[0][:, 3]
    after = np.asarray(run(jnp.asarray(changed), jnp.asarray(memory)))
    moved = np.abs(after - before).max((0, 2))
    assert (moved[3:] > 1e-3).all()
    if causal:
        np.testing.assert_array_equal(moved[:3], 0)
    else:
        assert (moved[:3] > 1e-4).all()


def test_every_token_sees_the_memory_but_not_its_padding(wide):
    tokens, memory = arrays()
    mask = jnp.asarray([[True] * 3 + [False] * 2] * 2)
    run = decoder(causal=True)
    before = np.asarray(run(jnp.asarray(tokens), jnp.asarray(memory), memory_mask=mask))
    for place, seen in ((1, True), (4, False)):
        changed = memory.copy()
        changed[:, place] = arrays(1)[1][:, place]
        after = np.asarray(run(jnp.asarray(tokens), jnp.asarray(changed), memory_mask=mask))
        moved = np.abs(after - before).max((0, 2))
        assert (moved > 1e-4).all() if seen else (moved == 0).all()


@pytest.mark.parametrize("room", [6, 9])
def test_one_token_at_a_time_gives_the_same_states(wide, room):
    tokens, memory = arrays()
    mask = jnp.asarray([[True] * 5, [True] * 4 + [False]])
    run = decoder(causal=True)
    whole = np.asarray(run(jnp.asarray(tokens), jnp.asarray(memory), memory_mask=mask))
    step = Stepper(run, jnp.asarray(memory), memory_mask=mask)
    past = step.begin(2, room)
    for place in range(tokens.shape[1]):
        past, state = step(past, jnp.asarray(tokens[:, place]), jnp.asarray(place))
        np.testing.assert_allclose(state, whole[:, place], rtol=1e-10, atol=1e-12)
