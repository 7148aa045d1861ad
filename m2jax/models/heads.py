# SPDX-License-Identifier: Apache-2.0
"""What the local objectives of SyCoCa put on top of the dual encoder: two decoders.

``CaptionHead`` writes the text from image tokens (IC); ``PatchHead`` paints masked patches from
text tokens, or ``PatchTokenHead`` tells their visual tokens (TG-MIM). All leave the encoder as
published: the caption decoder embeds its own words with the encoder's table, since the text tower
looks both ways and its states would give words away.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from m2jax import config as config_lib
from m2jax.models import layers
from m2jax.models.decoder import Decoder
from m2jax.models.m2_heads import CodeHead
from m2jax.models.stepwise import Past, Stepper


class CaptionHead(nnx.Module):
    """The multimodal text decoder; words are predicted by the encoder's own token table.

    Args:
        rngs: source of the initial values.
        cfg: sizes, those of the encoder.
        depth: number of decoder layers.
        languages: number of languages; each has a tag that stands where text begins.
    """

    def __init__(self, rngs: nnx.Rngs, cfg: config_lib.Model, depth: int, languages: int):
        d, dtype = cfg.width, jnp.dtype(cfg.param_dtype)
        small = layers.normal(d**-0.5)
        self.dtype = jnp.dtype(cfg.dtype)
        self.language_tags = layers.param(rngs, small, (languages, d), (None, "embed"), dtype)
        self.text_positions = layers.param(
            rngs, small, (cfg.max_text_len, d), (None, "embed"), dtype
        )
        self.decoder = Decoder(rngs, cfg, depth, causal=True)

    def __call__(
        self,
        words: Float[Array, "batch length width"],
        language: Int[Array, " batch"],
        memory: Float[Array, "batch memory width"],
    ) -> Float[Array, "batch length+1 width"]:
        """States that predict a text: the first its first word, from the tag alone, and so on.

        Args:
            words: embedded words of the text without its [CLS].
            language: of each text.
            memory: image tokens.
        """
        tags = self.language_tags[...][language].astype(self.dtype)[:, None]
        tokens = jnp.concatenate([tags, words], axis=1)
        positions = self.text_positions[...][: tokens.shape[1]].astype(self.dtype)
        return self.decoder(tokens + positions, memory)

    def begin(
        self,
        memory: Float[Array, "batch memory width"],
        language: Int[Array, " batch"],
        length: int,
    ) -> tuple[Stepper, Past, Float[Array, "batch width"]]:
        """The decoder ready to go on, a past that holds the tag, and the tag's state.

        Args:
            memory: image tokens.
            language: of each text.
            length: room for so many tokens, the tag too.
        """
        stepper = Stepper(self.decoder, memory)
        past = stepper.begin(len(memory), length)
        tags = self.language_tags[...][language].astype(self.dtype)
        return stepper, *self.advance(stepper, past, tags, 0)

    def advance(
        self,
        stepper: Stepper,
        past: Past,
        token: Float[Array, "rows width"],
        place: Int[Array, ""] | int,
    ) -> tuple[Past, Float[Array, "rows width"]]:
        """The state behind one more token; ``place`` counts those before it, the tag too."""
        # Past the longest text of training there is no position: the last one serves.
        table = self.text_positions[...]
        position = table[jnp.minimum(place, len(table) - 1)].astype(self.dtype)
        return stepper(past, token + position, jnp.asarray(place))


class PatchHead(nnx.Module):
    """The image decoder: image tokens, some of them masked, ask the text what lies there."""

    def __init__(self, rngs: nnx.Rngs, cfg: config_lib.Model, depth: int):
        self.decoder = Decoder(rngs, cfg, depth, causal=False)
        self.out = layers.Linear(
            rngs,
            (cfg.width, 3 * cfg.patch_size**2),
            ("embed", None),
            init=layers.normal(cfg.width**-0.5),
            bias_init=layers.constant(0.0),
            dtype=jnp.dtype(cfg.param_dtype),
        )

    def __call__(
        self,
        tokens: Float[Array, "batch tokens width"],
        text: Float[Array, "batch length width"],
        text_mask: Bool[Array, "batch length"],
    ) -> Float[Array, "batch patches values"]:
        """Normalised pixels of every patch, from [CLS] and patch tokens and the text."""
        return self.out(self.decoder(tokens, text, memory_mask=text_mask)[:, 1:])


class PatchTokenHead(nnx.Module):
    """The same decoder, for visual tokens: ``tokens`` holds a row per entry of the codebook."""

    def __init__(self, rngs: nnx.Rngs, cfg: config_lib.Model, depth: int, codes: int):
        self.decoder = Decoder(rngs, cfg, depth, causal=False)
        self.tokens = CodeHead(rngs, cfg, codes)

    def __call__(
        self,
        tokens: Float[Array, "batch tokens width"],
        text: Float[Array, "batch length width"],
        text_mask: Bool[Array, "batch length"],
    ) -> Float[Array, "batch patches width"]:
        """States that tell every patch's visual token by their products with ``tokens.embed``."""
        return self.decoder(tokens, text, memory_mask=text_mask)[:, 1:]


class Heads(nnx.Module):
    """The heads that the weights of a loss switch on."""

    def __init__(
        self, rngs: nnx.Rngs, cfg: config_lib.Model, loss: config_lib.Loss, languages: int
    ):
        caption, painted = loss.caption, loss.masked_image
        self.caption = CaptionHead(rngs, cfg, caption.layers, languages) if caption.weight else None
        if not painted.weight:
            self.masked_image = None
        elif painted.target == "tokens":
            codes = loss.visual_tokenizer.codes
            self.masked_image = PatchTokenHead(rngs, cfg, painted.layers, codes)
        else:
            self.masked_image = PatchHead(rngs, cfg, painted.layers)
