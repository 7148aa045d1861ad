# SPDX-License-Identifier: Apache-2.0
"""Image features with side information: dynamic MLP (late), and a vector that becomes a token.

The dynamic MLP is variant C of Yang et al. 2022 (arXiv 2203.03253) as the snake contest used it;
the residual block with norms is that of MetaFormer (arXiv 2203.02751). Parameters are plain arrays
[in, out], so the published tensors fit by a transpose.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Params = dict[str, Any]
EPS = 1e-5  # of layer norms, as in the public code


def linear(params: Params, x: Array) -> Array:
    """A linear map, x W + b."""
    return x @ params["kernel"] + params["bias"] if "bias" in params else x @ params["kernel"]


def layer_norm(params: Params, x: Array) -> Array:
    """Rows less their mean over their deviation, scaled and moved."""
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = jnp.square(centred).mean(axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + EPS) * params["scale"] + params["bias"]


def residual(params: Params, x: Float[Array, "batch dim"]) -> Float[Array, "batch dim"]:
    """The block x + relu(W2 relu(W1 x)) of the location encoder, without its dropout."""
    return x + jax.nn.relu(linear(params["w2"], jax.nn.relu(linear(params["w1"], x))))


def residual_norm(params: Params, x: Float[Array, "batch dim"]) -> Float[Array, "batch dim"]:
    """MetaFormer's block behind the side information: x + norm2(relu(W2 norm1(relu(W1 x))))."""
    y = layer_norm(params["norm1"], jax.nn.relu(linear(params["w1"], x)))
    return x + layer_norm(params["norm2"], jax.nn.relu(linear(params["w2"], y)))


def encode_side(params: Params, side: Float[Array, "batch side"]) -> Float[Array, "batch dim"]:
    """The location encoder (FCNet): a layer and residual blocks."""
    x = jax.nn.relu(linear(params["first"], side))
    for block in params["blocks"]:
        x = residual(block, x)
    return x


def encode_token(params: Params, side: Float[Array, "batch side"]) -> Float[Array, "batch dim"]:
    """MetaFormer's metadata token: norm(relu(W side)), then ``residual_norm``."""
    x = layer_norm(params["norm"], jax.nn.relu(linear(params["first"], side)))
    return residual_norm(params["block"], x)


def dynamic_layer(
    params: Params, image: Float[Array, "batch a"], side: Float[Array, "batch s"]
) -> Float[Array, "batch b"]:
    """A layer whose matrix is made for each example out of image and side information."""
    both = jnp.concatenate([image, side], axis=-1)
    x = linear(params["image2"], jax.nn.relu(linear(params["image1"], both)))
    weight = linear(params["weight2"], jax.nn.relu(linear(params["weight1"], both)))
    weight = weight.reshape(len(x), x.shape[-1], -1)
    y = jnp.einsum("bi,bio->bo", x, weight)
    y = jax.nn.relu(layer_norm(params["norm"], y))
    return jax.nn.relu(layer_norm(params["last_norm"], linear(params["last"], y)))


def fuse(
    params: Params, image: Float[Array, "batch dim"], side: Float[Array, "batch s"]
) -> Float[Array, "batch dim"]:
    """Late fusion: image + norm(W3 dynamic layers(W1 image, side))."""
    x = linear(params["inward"], image)
    for layer in params["layers"]:
        x = dynamic_layer(layer, x, side)
    return image + layer_norm(params["norm"], linear(params["outward"], x))


def initialise(
    rng: Array, dim: int, side: int, *, hidden: int = 64, narrow: int = 32, layers: int = 2
) -> Params:
    """First parameters of encoder and fusion; the last norm's scale is 0, so fusion starts as none.

    Args:
        rng: of the values.
        dim: of the image features.
        side: of the side information.
        hidden: of its encoding; the snake contest's 256.
        narrow: width of the dynamic layers.
        layers: how many of them.
    """
    keys = iter(jax.random.split(rng, 64))

    def full(a: int, b: int, *, bias: bool = True) -> Params:
        made = {"kernel": jax.random.normal(next(keys), (a, b)) * (2 / a) ** 0.5}
        return made | {"bias": jnp.zeros(b)} if bias else made

    def norm(n: int, scale: float = 1.0) -> Params:
        return {"scale": jnp.full(n, scale), "bias": jnp.zeros(n)}

    def dynamic() -> Params:
        both = narrow + hidden
        weight = full(narrow, narrow * narrow)
        weight["kernel"] *= narrow**-0.5  # the product with the features keeps their size
        return {
            "image1": full(both, narrow),
            "image2": full(narrow, narrow),
            "weight1": full(both, narrow),
            "weight2": weight,
            "norm": norm(narrow),
            "last": full(narrow, narrow, bias=False),
            "last_norm": norm(narrow),
        }

    encoder = {
        "first": full(side, hidden),
        "blocks": [{"w1": full(hidden, hidden), "w2": full(hidden, hidden)} for _ in range(4)],
    }
    fusion = {
        "inward": full(dim, narrow),
        "layers": [dynamic() for _ in range(layers)],
        "outward": full(narrow, dim),
        "norm": norm(dim, 0.0),
    }
    return {"encoder": encoder, "fusion": fusion}


def initialise_block(rng: Array, dim: int) -> Params:
    """First parameters of ``residual_norm``, which starts as the identity."""
    keys = jax.random.split(rng, 2)
    ones, zeros = jnp.ones(dim), jnp.zeros(dim)
    layers = {
        name: {"kernel": jax.random.normal(key, (dim, dim)) * (2 / dim) ** 0.5, "bias": zeros}
        for name, key in zip(("w1", "w2"), keys, strict=True)
    }
    norms = {
        "norm1": {"scale": ones, "bias": zeros},
        "norm2": {"scale": zeros, "bias": zeros},
    }
    return layers | norms


def initialise_token(rng: Array, dim: int, side: int, hidden: int = 64) -> Params:
    """First parameters of ``encode_token`` and of the map of a token onto the image features."""
    keys = jax.random.split(rng, 3)
    encoder = {
        "first": {
            "kernel": jax.random.normal(keys[0], (side, hidden)) * (2 / side) ** 0.5,
            "bias": jnp.zeros(hidden),
        },
        "norm": {"scale": jnp.ones(hidden), "bias": jnp.zeros(hidden)},
        "block": initialise_block(keys[1], hidden),
    }
    return {
        "encoder": encoder,
        "token": {"kernel": 0.01 * jax.random.normal(keys[2], (hidden, dim))},
    }


def drop_side(
    side: Float[Array, "batch side"], share: Float[Array, ""] | float, rng: Array
) -> Float[Array, "batch side"]:
    """Zeroes the side information of int(share x batch) random examples (MetaFormer's code).

    There ``share`` falls from 1 in the first epoch to 0 after the last, so the model also learns to
    do without; an image without metadata has zeros.
    """
    count = jnp.floor(share * len(side)).astype(jnp.int32)
    rank = jnp.argsort(jnp.argsort(jax.random.uniform(rng, (len(side),))))
    return jnp.where((rank < count)[:, None], 0.0, side)
