# SPDX-License-Identifier: Apache-2.0
"""What M2-Encoder's masked objectives put on top of the joint mode (arXiv 2401.15896).

The release holds neither heads nor losses (spec section 12): their form is BERT's and BEiT's, and
our choice.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from m2jax import config as config_lib
from m2jax.models import layers


class WordHead(nnx.Module):
    """What stands for a masked word, and the map from its state to the space of the token table.

    The map is BERT's (Devlin et al. 2019): linear, GELU, layer norm; the table is the encoder's.
    """

    def __init__(self, rngs: nnx.Rngs, cfg: config_lib.Model):
        d, dtype = cfg.width, jnp.dtype(cfg.param_dtype)
        self.mask_token = layers.param(rngs, layers.normal(d**-0.5), (d,), ("embed",), dtype)
        self.linear = layers.Linear.scaled(
            rngs, (d, d), ("embed", None), 1.0, stack=(), dtype=dtype
        )
        self.norm = layers.LayerNorm(rngs, d, dtype=dtype)

    def __call__(self, states: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        """States that predict words by their products with the token table."""
        return self.norm(layers.gelu(self.linear(states)))


class CodeHead(nnx.Module):
    """One row per visual token; a state's products with them are the logits (BEiT, section 2.3)."""

    def __init__(self, rngs: nnx.Rngs, cfg: config_lib.Model, codes: int):
        d, dtype = cfg.width, jnp.dtype(cfg.param_dtype)
        self.embed = layers.param(
            rngs, layers.normal(d**-0.5), (codes, d), ("vocab", "embed"), dtype
        )


class M2Heads(nnx.Module):
    """The heads that the weights of a loss switch on."""

    def __init__(self, rngs: nnx.Rngs, cfg: config_lib.Model, loss: config_lib.Loss):
        codes = loss.visual_tokenizer.codes
        self.masked_text = WordHead(rngs, cfg) if loss.masked_text.weight else None
        self.masked_tokens = CodeHead(rngs, cfg, codes) if loss.masked_tokens.weight else None
