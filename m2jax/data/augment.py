# SPDX-License-Identifier: Apache-2.0
"""Random changes to training images, made on the device inside the training step.

Scaling, shifting and mirroring are two small matrix products per image, turning three shears of the
same kind; colours change by one 3 x 3 matrix and an offset. All randomness comes from the step's
key, so a resumed run sees the same pictures.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from m2jax import config as config_lib

GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601 luma


def on_white(rgba: UInt8[Array, "*b h w 4"], dtype: jnp.dtype) -> Float[Array, "*b h w 3"]:
    """Composites straight-alpha images on white, in [0, 1]."""
    x = rgba.astype(dtype) / 255
    return x[..., :3] * x[..., 3:] + (1 - x[..., 3:])


def augment(
    rgba: UInt8[Array, "rows views h w 4"],
    cfg: config_lib.Augment,
    rng: jax.Array,
    dtype: jnp.dtype,
) -> Float[Array, "rows views h w 3"]:
    """Blends views, moves premultiplied RGBA, puts a background behind it, changes colours.

    Args:
        rgba: straight-alpha drawings; those of one row show the same thing.
        cfg: strengths; a change of strength 0 is not even traced.
        rng: the key of this batch.
        dtype: precision of the result.

    Returns:
        RGB in [0, 1].
    """
    keys = jax.random.split(rng, 5)
    x = rgba.astype(jnp.float32) / 255
    x = jnp.concatenate([x[..., :3] * x[..., 3:], x[..., 3:]], axis=-1)
    if cfg.mix > 0:
        x = _mix(x, cfg.mix, keys[0])
    x = _geometry(x.reshape(-1, *x.shape[2:]), cfg, keys[1])
    background = _background(x.shape[0], cfg, keys[2])
    rgb = x[..., :3] + (1 - x[..., 3:]) * background
    rgb = _colour(rgb, cfg, keys[3])
    if cfg.erase > 0:
        rgb = _erase(rgb, cfg.erase, keys[4])
    return jnp.clip(rgb, 0.0, 1.0).astype(dtype).reshape(*rgba.shape[:-1], 3)


def _mix(
    x: Float[Array, "rows views h w 4"], probability: float, rng: jax.Array
) -> Float[Array, "rows views h w 4"]:
    """Blends a drawing with the next one of its row, at most half and half.

    The blend of two vendors' drawings is a drawing by a vendor in between (mixup, Zhang et al.
    2018, inside a class): what a model for unseen vendors should take in its stride.
    """
    use, share = jax.random.split(rng)
    shape = (*x.shape[:2], 1, 1, 1)
    weight = jax.random.bernoulli(use, probability, shape) * jax.random.uniform(share, shape)
    return x + 0.5 * weight * (jnp.roll(x, 1, axis=1) - x)


def _geometry(x: Float[Array, "b h w 4"], cfg: config_lib.Augment, rng: jax.Array) -> jax.Array:
    """Scale, stretch, shift and mirror as W_y @ x @ W_x^T with bilinear weights; then rotate."""
    b, size = x.shape[0], x.shape[1]
    keys = jax.random.split(rng, 5)
    zoom = jax.random.uniform(keys[0], (b, 1), minval=1 - cfg.scale, maxval=1 + cfg.scale)
    aspect = jax.random.uniform(keys[1], (b, 1), minval=1 - cfg.stretch, maxval=1 + cfg.stretch)
    factor = jnp.concatenate([zoom * aspect**0.5, zoom * aspect**-0.5], axis=1)  # of y, of x
    shift = jax.random.uniform(keys[2], (b, 2), minval=-cfg.shift, maxval=cfg.shift) * size
    mirror = jnp.where(jax.random.bernoulli(keys[3], cfg.flip, (b,)), -1.0, 1.0)
    sign = jnp.stack([jnp.ones((b,)), mirror], axis=1)
    centre = (size - 1) / 2
    if cfg.rotate > 0:  # three shears (Paeth 1986), each a product with bilinear weights
        angle = jnp.deg2rad(cfg.rotate) * jax.random.uniform(keys[4], (b,), minval=-1.0)
        x = _rotate(x, angle)
    target = jnp.arange(size, dtype=jnp.float32)
    source = (target - centre - shift[..., None]) * (sign / factor)[..., None] + centre
    weights = jnp.maximum(0.0, 1.0 - jnp.abs(source[..., None] - target))  # [b, 2, out, in]
    x = jnp.einsum("bij,bjwc->biwc", weights[:, 0], x)
    return jnp.einsum("bij,bhjc->bhic", weights[:, 1], x)


def _rotate(x: Float[Array, "b h w c"], angle: Float[Array, " b"]) -> jax.Array:
    """Turns each image by its angle (radians): shears along x, y, x."""
    along_x = -jnp.tan(angle / 2)
    x = _shear(x, along_x)
    x = _shear(x.swapaxes(1, 2), jnp.sin(angle)).swapaxes(1, 2)
    return _shear(x, along_x)


def _shear(x: Float[Array, "b h w c"], slope: Float[Array, " b"]) -> jax.Array:
    """Moves row h sideways by slope * (h - centre), bilinearly."""
    h, w = x.shape[1], x.shape[2]
    move = slope[:, None] * (jnp.arange(h) - (h - 1) / 2)
    at = jnp.arange(w, dtype=jnp.float32)
    weights = jnp.maximum(0.0, 1.0 - jnp.abs(at[:, None] - move[..., None, None] - at))
    return jnp.einsum("bhij,bhjc->bhic", weights, x)


def _background(n: int, cfg: config_lib.Augment, rng: jax.Array) -> jax.Array:
    """White, or with probability ``background`` one random colour per image [n, 1, 1, 3]."""
    chosen, colour = jax.random.split(rng)
    random = jax.random.uniform(colour, (n, 1, 1, 3))
    use = jax.random.bernoulli(chosen, cfg.background, (n, 1, 1, 1))
    return jnp.where(use, random, 1.0)


def _colour(x: Float[Array, "b h w 3"], cfg: config_lib.Augment, rng: jax.Array) -> jax.Array:
    """Hue, saturation, grey, contrast and tint as one 3 x 3 matrix about mid-grey; brightness."""
    n = x.shape[0]
    keys = jax.random.split(rng, 6)

    def factor(key, strength):
        return jax.random.uniform(key, (n, 1, 1), minval=1 - strength, maxval=1 + strength)

    luma = jnp.broadcast_to(jnp.array(GREY)[:, None], (3, 3))  # x @ luma: grey in every channel
    saturation = factor(keys[0], cfg.saturation)
    saturation = jnp.where(jax.random.bernoulli(keys[1], cfg.grey, (n, 1, 1)), 0.0, saturation)
    matrix = luma + saturation * (jnp.eye(3) - luma)
    angle = jnp.deg2rad(cfg.hue) * jax.random.uniform(keys[2], (n, 1, 1), minval=-1.0)
    matrix = matrix @ _hue_rotation(angle) * factor(keys[3], cfg.contrast)
    matrix = matrix @ (jnp.eye(3) + cfg.tint * jax.random.normal(keys[5], (n, 3, 3)))
    offset = cfg.brightness * jax.random.uniform(keys[4], (n, 1, 1, 3), minval=-1.0)
    return jnp.einsum("bhwc,bcd->bhwd", x - 0.5, matrix) + 0.5 + offset


def _hue_rotation(angle: Float[Array, "n 1 1"]) -> Float[Array, "n 3 3"]:
    """Rotation of RGB space about the grey axis (Rodrigues' formula)."""
    axis = jnp.full((3,), 3**-0.5)
    cross = jnp.array([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) * 3**-0.5
    outer = axis[:, None] * axis
    return jnp.cos(angle) * jnp.eye(3) + jnp.sin(angle) * cross + (1 - jnp.cos(angle)) * outer


def _erase(x: Float[Array, "b h w 3"], probability: float, rng: jax.Array) -> jax.Array:
    """Paints one rectangle of random place, size (a tenth to a half of the side) and colour."""
    b, h, w, _ = x.shape
    keys = jax.random.split(rng, 4)
    centre = jax.random.uniform(keys[0], (2, b, 1, 1))
    half = jax.random.uniform(keys[1], (2, b, 1, 1), minval=0.05, maxval=0.25)
    rows = jnp.abs((jnp.arange(h)[:, None] + 0.5) / h - centre[0]) < half[0]
    columns = jnp.abs((jnp.arange(w) + 0.5) / w - centre[1]) < half[1]
    use = jax.random.bernoulli(keys[2], probability, (b, 1, 1))
    colour = jax.random.uniform(keys[3], (b, 1, 1, 3))
    return jnp.where((rows & columns & use)[..., None], colour, x)
