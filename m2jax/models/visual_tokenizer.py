# SPDX-License-Identifier: Apache-2.0
"""A visual tokenizer: patches to entries of a codebook, trained to tell another model's features.

The form of BEiT v2 (Peng et al. 2022, arXiv 2208.06366, section 2.2): an encoder, unit codes of 32
numbers, the nearest of 8,192 unit code words, and a small decoder from code words to the features.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from m2jax import config as config_lib
from m2jax.config import UserError
from m2jax.config_dual import Tower
from m2jax.models import layers
from m2jax.models.m2 import unit
from m2jax.models.stack import Stack


class Quantised(NamedTuple):
    """An image as code words."""

    ids: Int[Array, "batch patches"]
    codes: Float[Array, "batch patches dim"]  # unit rows, before they are rounded to words
    words: Float[Array, "batch patches dim"]  # unit rows, of the codebook


class VisualTokenizer(nnx.Module):
    """Encoder, codebook and decoder.

    Args:
        rngs: source of the initial values.
        model: the encoder whose image and patch sizes, and other sizes left at 0, it takes.
        cfg: its own sizes.

    Raises:
        UserError: a width that its heads do not divide.
    """

    def __init__(self, rngs: nnx.Rngs, model: config_lib.Model, cfg: config_lib.VisualTokenizer):
        dtype, patch = jnp.dtype(model.param_dtype), model.patch_size
        d, heads = cfg.width or model.width, cfg.heads or model.heads
        if d % heads:
            raise UserError(
                f"loss.visual_tokenizer.width={d}: not a multiple of heads={heads}: change one"
            )
        depth = cfg.encoder_layers or model.backbone_layers + model.vl_layers
        self.patch_size, self.dtype = patch, jnp.dtype(model.dtype)

        def linear(size: int, out: int, axes: tuple[str | None, str | None]) -> layers.Linear:
            return layers.Linear.scaled(rngs, (size, out), axes, 1.0, stack=(), dtype=dtype)

        def stack(layers_of: int) -> Stack:
            tower = Tower(
                width=d, layers=layers_of, heads=heads, mlp_width=4 * d, activation="gelu"
            )
            return Stack(
                rngs, tower, post_norm=False, attention=model.attention, dtype=dtype,
                remat=model.remat, unroll=model.unroll,
            )  # fmt: skip

        def positions() -> nnx.Param:
            patches = (model.image_size // patch) ** 2
            return layers.param(rngs, layers.normal(d**-0.5), (patches, d), (None, "embed"), dtype)

        values = 3 * patch**2
        self.patch_in = linear(values, d, (None, "embed"))
        self.image_positions = positions()
        self.encoder, self.encoder_norm = stack(depth), layers.LayerNorm(rngs, d, dtype=dtype)
        self.code = linear(d, cfg.code_dim, ("embed", None))
        self.codebook = nnx.Dict(
            embed=layers.param(
                rngs, layers.normal(1.0), (cfg.codes, cfg.code_dim), ("vocab", None), dtype
            )
        )
        self.word_in = linear(cfg.code_dim, d, (None, "embed"))
        self.positions = positions()
        self.decoder = stack(cfg.decoder_layers)
        self.decoder_norm = layers.LayerNorm(rngs, d, dtype=dtype)
        out = model.out_dim if cfg.target == "features" else values
        self.out = linear(d, out, ("embed", None))

    def quantise(self, pixels: Float[Array, "batch height width 3"]) -> Quantised:
        """Code words of the patches of RGB images in [0, 1], row by row."""
        b, h, w, _ = pixels.shape
        p = self.patch_size
        x = ((pixels - 0.5) / 0.5).astype(self.dtype)
        x = x.reshape(b, h // p, p, w // p, p, 3).swapaxes(2, 3).reshape(b, -1, p * p * 3)
        x = self.patch_in(x) + self.image_positions[...].astype(self.dtype)
        codes = unit(self.code(self.encoder_norm(self.encoder(x))))
        book = unit(self.codebook["embed"][...])
        # Of unit rows the nearest is the one with the largest cosine (their equation 1).
        ids = jax.lax.stop_gradient(jnp.einsum("bpd,vd->bpv", codes, book)).argmax(-1)
        return Quantised(ids.astype(jnp.int32), codes, book[ids])

    def decode(self, words: Float[Array, "batch patches dim"]) -> Float[Array, "batch patches out"]:
        """What the decoder makes of code words."""
        x = self.word_in(words.astype(self.dtype)) + self.positions[...].astype(self.dtype)
        return self.out(self.decoder_norm(self.decoder(x)))
