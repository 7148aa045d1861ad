# SPDX-License-Identifier: Apache-2.0
"""The network that sees copied segments as patterns on a similarity map.

SSAN and VCSL detect such patterns with a one-class detector on the map (SPD). This one is our own:
a small residual network with a feature pyramid at strides 4, 8 and 16 and one anchor-free head,
normalised by groups, so that a batch of one behaves as a batch of many.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

STRIDES = (4, 8, 16)
GROUPS = 4
FIRST_SIDES = 4.0  # strides from a place to each side of its box, before training
FIRST_SCORE = 0.01
FURTHEST = 5.0  # a side lies within e^5 strides


class Seen(NamedTuple):
    """What the network says at each place."""

    logits: Float[Array, "batch places"]
    boxes: Float[Array, "batch places 4"]  # (left, top, right, bottom) in pixels


class Places(NamedTuple):
    """Where the network looks, finest stride first."""

    centres: Float[np.ndarray, "places 2"]  # (x, y) in pixels
    strides: Float[np.ndarray, " places"]


@functools.lru_cache(maxsize=8)
def places(size: int) -> Places:
    """The places of a square of so many pixels."""
    centres, strides = [], []
    for stride in STRIDES:
        line = (np.arange(size // stride) + 0.5) * stride
        x, y = np.meshgrid(line, line)
        centres.append(np.stack([x.reshape(-1), y.reshape(-1)], axis=1))
        strides.append(np.full(x.size, stride))
    return Places(
        np.concatenate(centres).astype(np.float32), np.concatenate(strides).astype(np.float32)
    )


class Block(nnx.Module):
    """Two convolutions beside the identity."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs) -> None:
        conv = functools.partial(nnx.Conv, channels, channels, (3, 3), use_bias=False, rngs=rngs)
        self.first, self.second = conv(), conv()
        self.norms = nnx.List([nnx.GroupNorm(channels, num_groups=GROUPS, rngs=rngs) for _ in "12"])

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Same shape."""
        y = jax.nn.silu(self.norms[0](self.first(x)))
        return jax.nn.silu(x + self.norms[1](self.second(y)))


class Detector(nnx.Module):
    """One class of patterns in a square map.

    Args:
        size: pixels of a side, a multiple of 16.
        width: channels of the first layer, a multiple of 4.
        rngs: of the first parameters.
    """

    def __init__(self, size: int, width: int, *, rngs: nnx.Rngs) -> None:
        self.size = size
        conv = functools.partial(nnx.Conv, rngs=rngs)
        channels = [width, 2 * width, 3 * width, 4 * width]
        self.stem = conv(1, width, (4, 4), strides=2)
        self.down = nnx.List(
            [conv(a, b, (3, 3), strides=2) for a, b in itertools.pairwise(channels)]
        )
        self.blocks = nnx.List([Block(c, rngs=rngs) for c in channels[1:]])
        self.lateral = nnx.List([conv(c, 2 * width, (1, 1)) for c in channels[1:]])
        self.head = nnx.List([conv(2 * width, 2 * width, (3, 3)) for _ in "12"])
        first = nnx.initializers.constant
        unsure = np.log(FIRST_SCORE / (1 - FIRST_SCORE))
        self.score = conv(2 * width, 1, (3, 3), bias_init=first(unsure))
        self.sides = conv(2 * width, 4, (3, 3), bias_init=first(np.log(FIRST_SIDES)))

    def __call__(self, squares: Float[Array, "batch size size"]) -> Seen:
        """Scores and boxes at each place."""
        x = jax.nn.silu(self.stem(squares[..., None]))
        levels = []
        for down, block in zip(self.down, self.blocks, strict=True):
            x = block(jax.nn.silu(down(x)))
            levels.append(x)
        above, found = None, []
        for lateral, level in list(zip(self.lateral, levels, strict=True))[::-1]:
            x = lateral(level)
            if above is not None:
                x = x + above.repeat(2, axis=1).repeat(2, axis=2)
            above = x
            y = jax.nn.silu(self.head[1](jax.nn.silu(self.head[0](above))))
            found.append((self.score(y), self.sides(y)))
        batch = len(squares)
        logits, sides = (
            jnp.concatenate([part.reshape(batch, -1, part.shape[-1]) for part in parts], axis=1)
            for parts in zip(*found[::-1], strict=True)
        )
        where = places(self.size)
        reach = jnp.exp(jnp.clip(sides, -FURTHEST, FURTHEST)) * where.strides[:, None]
        boxes = jnp.concatenate(
            [where.centres - reach[..., :2], where.centres + reach[..., 2:]], axis=-1
        )
        return Seen(logits[..., 0], boxes)
