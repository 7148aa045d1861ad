# SPDX-License-Identifier: Apache-2.0
"""M2-Encoder: two towers that share one multiway transformer.

The released model, exactly (alipay/Ant-Multi-Modal-Framework e7b7dc7, prj/M2_Encoder): image tokens
take the A weights of the backbone, text tokens its B weights, and both then take the *A* weights of
the vl layers. The B weights of the vl layers, ``norm`` and ``pooler`` are built because checkpoints
hold them; no public forward of the release reads them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from m2jax import config as config_lib
from m2jax.dist.sharding import constrain
from m2jax.models import layers
from m2jax.models.multiway import ALL_A, ALL_B, Encoded, Encoder

POSITION_OFFSET = 2  # rows 0 and 1 of both position tables are never read
VOCAB_MULTIPLE = 2048  # the table is padded so that it divides over any mesh


def padded_vocab(size: int) -> int:
    """Rows of the token table inside: ``size`` rounded up to a multiple of 2,048."""
    return -(-size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


class Features(NamedTuple):
    """One modality, encoded. ``features`` is what retrieval and zero-shot use."""

    features: Float[Array, "batch out"]  # unit rows, from the vl layers
    backbone_features: Float[Array, "batch out"]  # unit rows, from the backbone
    backbone: Encoded
    vl: Encoded


class Joint(NamedTuple):
    """Image and text, encoded as one sequence: states of the vl layers."""

    image: Float[Array, "batch tokens width"]  # [CLS] first
    text: Float[Array, "batch length width"]


class VisionEmbed(nnx.Module):
    """Pixels to [CLS] + row-major patch tokens."""

    def __init__(self, rngs: nnx.Rngs, cfg: config_lib.Model):
        dtype, p = jnp.dtype(cfg.param_dtype), cfg.patch_size
        bound = (3 * p * p) ** -0.5
        self.patch_size = p
        self.kernel = layers.param(
            rngs, layers.uniform(bound), (p, p, 3, cfg.width), (None, None, None, "embed"), dtype
        )
        self.bias = layers.param(rngs, layers.uniform(bound), (cfg.width,), ("embed",), dtype)
        zero = layers.constant(0.0)
        self.cls_token = layers.param(rngs, zero, (cfg.width,), ("embed",), dtype)
        self.mask_token = layers.param(rngs, zero, (cfg.width,), ("embed",), dtype)

    def __call__(
        self,
        pixels: Float[Array, "batch height width 3"],
        *,
        masked: Bool[Array, "batch patches"] | None = None,
    ) -> Float[Array, "batch tokens embed"]:
        """``pixels`` lie in [0, 1]; masked patches become the mask token."""
        b, h, w, _ = pixels.shape
        p, dtype = self.patch_size, pixels.dtype
        x = (pixels - 0.5) / 0.5
        x = x.reshape(b, h // p, p, w // p, p, 3).swapaxes(2, 3).reshape(b, -1, p * p * 3)
        kernel = self.kernel[...].astype(dtype).reshape(p * p * 3, -1)
        x = x @ kernel + self.bias[...].astype(dtype)
        if masked is not None:
            x = jnp.where(masked[..., None], self.mask_token[...].astype(dtype), x)
        cls = jnp.broadcast_to(self.cls_token[...].astype(dtype), (b, 1, x.shape[-1]))
        return jnp.concatenate([cls, x], axis=1)


class M2Encoder(nnx.Module):
    """The bilingual dual encoder.

    Args:
        cfg: a resolved ``config.Model``.
        rngs: source of the initial values (spec section 8 for ``init="torch"``).
    """

    def __init__(self, cfg: config_lib.Model, rngs: nnx.Rngs):
        d, dtype = cfg.width, jnp.dtype(cfg.param_dtype)
        self.cfg = cfg
        self.dtype = jnp.dtype(cfg.dtype)
        patches = (cfg.image_size // cfg.patch_size) ** 2
        random = layers.normal(1.0 if cfg.init == "torch" else d**-0.5)
        in_image = random if cfg.init == "torch" else grid_positions

        def table(rows: int, init: layers.Init, axes: tuple[str | None, str | None]) -> nnx.Param:
            return layers.param(rngs, init, (rows, d), axes, dtype)

        def head(out: int) -> layers.Linear:
            std = 0.02 if cfg.init == "torch" else d**-0.5
            return layers.Linear(
                rngs, (d, out), ("embed", "features"), init=layers.normal(std), dtype=dtype
            )

        self.text_embed = table(
            padded_vocab(cfg.vocab_size), layers.normal(d**-0.5), ("vocab", "embed")
        )
        self.vision_embed = VisionEmbed(rngs, cfg)
        self.image_positions = table(patches + 1 + POSITION_OFFSET, in_image, (None, "embed"))
        self.text_positions = table(cfg.text_positions, random, (None, "embed"))
        self.backbone = Encoder(rngs, cfg, cfg.backbone_layers)
        self.vl = Encoder(rngs, cfg, cfg.vl_layers)
        self.norm = layers.LayerNorm(rngs, d, eps=1e-6, dtype=dtype)
        self.pooler = layers.Linear(
            rngs,
            (d, d),
            ("embed", None),
            init=layers.normal(0.02),
            bias_init=layers.constant(0.0),
            dtype=dtype,
        )
        self.image_head = head(cfg.out_dim)
        self.text_head = head(cfg.out_dim)
        self.image_vl_head = head(cfg.out_dim)
        self.text_vl_head = head(cfg.out_dim)
        scale = layers.constant(math.log(1 / 0.07))
        self.logit_scale = layers.param(rngs, scale, (), (), dtype)
        self.logit_vl_scale = layers.param(rngs, scale, (), (), dtype)

    def encode_image(
        self,
        pixels: Float[Array, "batch height width 3"],
        *,
        masked: Bool[Array, "batch patches"] | None = None,
        rng: jax.Array | None = None,
        capture: bool = False,
    ) -> Features:
        """Encodes RGB images in [0, 1].

        A smaller or non-square image runs on the first rows of the position table, as in the
        release (no interpolation). ``rng`` switches on what training adds: drop path, patch drop.
        """
        tokens = self.embed_image(pixels, masked=masked)
        if rng is not None and self.cfg.patch_drop > 0:
            tokens = drop_patches(tokens, self.cfg.patch_drop, jax.random.fold_in(rng, 0))
        heads = (self.image_head, self.image_vl_head)
        return self._encode(tokens, ALL_A, None, heads, rng, capture)

    def encode_text(
        self,
        ids: Int[Array, "batch length"],
        mask: Int[Array, "batch length"] | Bool[Array, "batch length"],
        *,
        rng: jax.Array | None = None,
        capture: bool = False,
    ) -> Features:
        """Encodes token ids; ``mask`` is 1 for tokens and 0 for padding."""
        heads = (self.text_head, self.text_vl_head)
        return self._encode(self.embed_text(ids), ALL_B, mask, heads, rng, capture)

    def embed_image(
        self,
        pixels: Float[Array, "batch height width 3"],
        *,
        masked: Bool[Array, "batch patches"] | None = None,
    ) -> Float[Array, "batch tokens embed"]:
        """[CLS] and patch tokens with their positions."""
        tokens = self.vision_embed(pixels.astype(self.dtype), masked=masked)
        return tokens + _positions(self.image_positions[...], tokens)

    def encode_patches(
        self, pixels: Float[Array, "batch size size 3"]
    ) -> Float[Array, "batch patches features"]:
        """Unit rows of patches in the space of the texts: the image head's maps of their tokens."""
        return unit(self.image_vl_head(self.encode_image(pixels).vl.tokens[:, 1:]))

    def encode_joint(
        self,
        image: Float[Array, "batch tokens embed"],
        text: Float[Array, "batch length embed"],
        mask: Int[Array, "batch length"] | Bool[Array, "batch length"],
        *,
        vl: str = "split",
        rng: jax.Array | None = None,
    ) -> Joint:
        """Encodes image and text as one sequence in which each token sees all (spec section 7).

        Args:
            image: of ``embed_image``; its tokens take A weights in the backbone.
            text: of ``embed_text``; its tokens take B weights there.
            mask: 1 for text tokens, 0 for padding.
            vl: weights of the vl layers: ``A``, ``B`` or ``split``, as in the backbone. Which of
                them the release was trained with is not known.
            rng: switches drop path on.
        """
        split = image.shape[1]
        both = jnp.concatenate([jnp.ones(image.shape[:2], mask.dtype), mask], axis=1)
        tokens = constrain(jnp.concatenate([image, text], axis=1), ("batch", None, None))
        rngs = (None, None) if rng is None else tuple(jax.random.split(rng))
        tokens = self.backbone(tokens, split=split, token_mask=both, rng=rngs[0]).tokens
        way = {"split": split, "A": ALL_A, "B": ALL_B}[vl]
        tokens = self.vl(tokens, split=way, token_mask=both, rng=rngs[1]).tokens
        return Joint(tokens[:, :split], tokens[:, split:])

    def embed_text(
        self,
        ids: Int[Array, "batch length"],
        *,
        masked: Bool[Array, "batch length"] | None = None,
        mask_token: Float[Array, " embed"] | None = None,
    ) -> Float[Array, "batch length embed"]:
        """Token embeddings with their positions; masked words become ``mask_token``."""
        tokens = layers.lookup(self.text_embed[...], ids, self.dtype)
        if masked is not None and mask_token is not None:
            tokens = jnp.where(masked[..., None], mask_token.astype(self.dtype), tokens)
        return tokens + _positions(self.text_positions[...], tokens)

    def _encode(self, tokens, split, mask, heads, rng, capture) -> Features:
        rngs = (None, None) if rng is None else tuple(jax.random.split(rng))
        tokens = constrain(tokens, ("batch", None, None))
        backbone = self.backbone(tokens, split=split, token_mask=mask, rng=rngs[0], capture=capture)
        # Text takes the A weights here too: that is how the released models were evaluated.
        vl = self.vl(backbone.tokens, split=ALL_A, token_mask=mask, rng=rngs[1], capture=capture)
        first = unit(heads[0](backbone.tokens[:, 0]))
        return Features(unit(heads[1](vl.tokens[:, 0])), first, backbone, vl)


def unit(x: Float[Array, "... d"]) -> Float[Array, "... d"]:
    """Rows divided by their Euclidean norm, no epsilon (spec section 6), in float32 or higher."""
    x = x.astype(layers.at_least_float32(x.dtype))
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True))


def drop_patches(
    tokens: Float[Array, "batch tokens embed"], ratio: float, rng: jax.Array
) -> Float[Array, "batch kept embed"]:
    """Keeps [CLS] and int(tokens * (1 - ratio)) random patches (FLIP; spec section 7)."""
    b, n, _ = tokens.shape
    kept = int(n * (1.0 - ratio))
    order = jnp.argsort(jax.random.uniform(rng, (b, n - 1)), axis=1)[:, :kept]
    patches = jnp.take_along_axis(tokens[:, 1:], order[..., None], axis=1)
    return jnp.concatenate([tokens[:, :1], patches], axis=1)


def grid_positions(rng: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """First image positions of ``init="scaled"``: half-size sines and cosines of row and column.

    As large as the patch embeddings they are added to, so attention knows from the first step where
    a patch lies. The rows of no patch are random and small: a [CLS] of zeros, whose layer norm
    divides by almost nothing, would start with gradients a hundred times the others'.
    """
    rows, width = shape
    side = math.isqrt(rows - POSITION_OFFSET - 1)
    waves = 100.0 ** -jnp.linspace(0.0, 1.0, width // 4, endpoint=False)
    row, column = jnp.divmod(jnp.arange(side * side), side)
    angles = jnp.concatenate([row[:, None] * waves, column[:, None] * waves], axis=1)
    grid = 0.5 * jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)
    table = layers.normal(width**-0.5)(rng, shape, dtype)
    return table.at[POSITION_OFFSET + 1 :, : grid.shape[1]].set(grid.astype(dtype))


def _positions(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Rows 2, 3, ... of a table, one per token."""
    return table[POSITION_OFFSET : POSITION_OFFSET + tokens.shape[1]].astype(tokens.dtype)
