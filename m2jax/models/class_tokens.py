# SPDX-License-Identifier: Apache-2.0
"""A vision transformer with several class tokens, each with a position of its own (DC-Former).

Source: Li et al. 2023 (AAAI) and its published code, which builds on TransReID (He et al. 2021):
overlapping patches, images of any shape, and side information (a camera's embedding on every
token). The layers are those of a plain transformer (ViT, CLIP) or the image side of an M2-Encoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from m2jax.config import UserError
from m2jax.config_dual import Architecture, Dual, Tower
from m2jax.dist.sharding import constrain
from m2jax.models import layers
from m2jax.models.m2 import POSITION_OFFSET
from m2jax.models.multiway import OneWay
from m2jax.models.params import Params
from m2jax.models.stack import Stack

SIDE_WEIGHT = 3.0  # of the camera's embedding
FAMILIES = ("plain", "m2")


@dataclass(frozen=True, kw_only=True)
class ClassTokens(Tower):
    """Sizes of the model; those of a ViT-B/16 unless given."""

    family: str = "plain"  # plain (ViT, CLIP) | m2 (the image side of an M2-Encoder)
    vl_layers: int = 0  # m2 alone: on top of ``layers``, with a norm between
    activation: str = "gelu"
    eps: float = 1e-6
    tokens: int = 2  # class tokens, K
    height: int = 256  # pixels
    image_width: int = 128  # pixels
    patch_size: int = 16  # pixels
    stride: tuple[int, int] = (16, 16)  # down and across; below the patch size patches overlap
    pre_norm: bool = False  # a norm before the first layer (CLIP's towers have it)
    cameras: int = 0  # with an embedding of their own; 0: no side information
    side_weight: float = SIDE_WEIGHT
    remat: str = "none"

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        down, across = (
            (side - self.patch_size) // step + 1
            for side, step in zip((self.height, self.image_width), self.stride, strict=True)
        )
        return down, across


class ClassTokenTower(nnx.Module):
    """Pixels to K vectors of an image.

    Raises:
        UserError: sizes that do not fit together.
    """

    def __init__(self, rngs: nnx.Rngs, cfg: ClassTokens):
        sizes = (cfg.width, cfg.layers, cfg.heads, cfg.mlp_width, cfg.tokens, cfg.patch_size)
        if min(*sizes, *cfg.stride) < 1 or min(cfg.grid) < 1 or cfg.width % cfg.heads:
            raise UserError(
                f"class tokens: {cfg.tokens} tokens, {cfg.height} x {cfg.image_width} pixels, "
                f"patches of {cfg.patch_size} every {cfg.stride}, width {cfg.width} in "
                f"{cfg.heads} heads: these do not fit together: change one"
            )
        if cfg.family not in FAMILIES or (cfg.family == "m2" and cfg.mlp_width != 4 * cfg.width):
            raise UserError(
                f"class tokens: family {cfg.family!r} with mlp_width {cfg.mlp_width}: use one of "
                f"{', '.join(FAMILIES)}; m2 has 4 x {cfg.width}"
            )
        d, p, kind = cfg.width, cfg.patch_size, jnp.dtype("float32")
        self.cfg = cfg

        def table(*shape: int, std: float = 0.02) -> nnx.Param:
            axes = (*(None,) * (len(shape) - 1), "embed")
            return layers.param(rngs, layers.normal(std), shape, axes, kind)

        self.kernel = table(p, p, 3, d, std=(3 * p * p) ** -0.5)
        self.bias = table(d, std=0.0)
        self.cls_tokens = table(cfg.tokens, d)
        # Random and different per token: with equal rows the tokens would stay equal for ever.
        self.positions = table(cfg.tokens + cfg.grid[0] * cfg.grid[1], d)
        self.cameras = table(cfg.cameras, d) if cfg.cameras else None
        self.pre_norm = layers.LayerNorm(rngs, d, eps=cfg.eps) if cfg.pre_norm else None
        if cfg.family == "m2":
            sizes = {"width": d, "heads": cfg.heads, "remat": cfg.remat}
            self.backbone = OneWay(rngs, depth=cfg.layers, **sizes)
            self.vl = OneWay(rngs, depth=cfg.vl_layers, **sizes) if cfg.vl_layers else None
            return
        self.stack = Stack(
            rngs, cfg, post_norm=False, attention="batch", dtype=kind, remat=cfg.remat, unroll=1
        )
        self.norm = layers.LayerNorm(rngs, d, eps=cfg.eps)

    def __call__(
        self, pixels: Float[Array, "batch h w 3"], cameras: Int[Array, " batch"] | None = None
    ) -> Float[Array, "batch k width"]:
        """The class tokens after the last norm.

        Args:
            pixels: normalised.
            cameras: of each image, from 0; the model must have embeddings for them. Without, the
                tokens get no side information.
        """
        kernel = self.kernel[...].astype(pixels.dtype)
        patches = jax.lax.conv_general_dilated(
            pixels,
            kernel,
            self.cfg.stride,
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision="highest",
        )
        patches = patches.reshape(len(pixels), -1, self.cfg.width) + self.bias[...]
        first = jnp.broadcast_to(self.cls_tokens[...], (len(pixels), *self.cls_tokens[...].shape))
        x = jnp.concatenate([first, patches], axis=1) + self.positions[...]
        if cameras is not None:
            assert self.cameras is not None
            x = x + self.cfg.side_weight * self.cameras[...][cameras][:, None]
        x = x if self.pre_norm is None else self.pre_norm(x)
        x = constrain(x, ("batch", None, None))
        if self.cfg.family == "m2":
            x = self.backbone(x)
            return (x if self.vl is None else self.vl(x))[:, : self.cfg.tokens]
        return self.norm(self.stack(x)[:, : self.cfg.tokens])


def resized_positions(
    table: Float[Array, "rows width"], first: int, grid: tuple[int, int], new: Array
) -> Float[Array, "new width"]:
    """A position table for another grid and another number of class tokens.

    Args:
        table: of a model with a square grid: ``first`` rows of class tokens, then the grid.
        first: how many those are; they are not taken over.
        grid: patches down and across.
        new: a fresh table, whose rows of class tokens stay as they are: what tells tokens apart.
    """
    side = int((len(table) - first) ** 0.5)
    if side * side != len(table) - first:
        raise UserError(
            f"class tokens: {len(table) - first} positions of patches are no square grid: "
            "start from a model of square images"
        )
    old = table[first:].reshape(side, side, -1)
    # Bilinear with half-pixel centres and no smoothing, as torch resizes without align_corners.
    found = jax.image.resize(old, (*grid, old.shape[-1]), "linear", antialias=False)
    flat = found.reshape(grid[0] * grid[1], -1)
    return jnp.concatenate([new[: len(new) - len(flat)], flat.astype(new.dtype)])


def tower_of(model: Architecture, **changes: Any) -> ClassTokens:
    """The sizes that a tower must have to start from the image tower of a model.

    Args:
        model: config of the source.
        **changes: fields of ``ClassTokens`` that are the new model's own: tokens, height, stride.

    Raises:
        UserError: a tower without a class token (SigLIP's).
    """
    if not isinstance(model, Dual):
        sizes = {
            "family": "m2",
            "layers": model.backbone_layers,
            "vl_layers": model.vl_layers,
            "mlp_width": 4 * model.width,
            "eps": layers.LAYER_NORM_EPS,
        }
        source, same = model, ("width", "heads", "patch_size")
    else:
        source, sizes = model.vision, {}
        same = ("width", "layers", "heads", "mlp_width", "activation", "eps", "patch_size")
        same += ("pre_norm",)
        if model.vision.pooling != "cls":
            raise UserError(f"--init: a {model.family} tower has no class token: {_START}")
    taken = {name: getattr(source, name) for name in same} | sizes
    step = taken["patch_size"]
    return ClassTokens(**{**taken, "stride": (step, step), **changes})


_START = "start from an M2-Encoder, a ViT or a CLIP model"


def from_vision_tower(params: Params, cfg: ClassTokens, rng: jax.Array) -> Params:
    """Parameters that start from the image tower of a trained model.

    The class token is copied to all K; their positions start at random, the grid's are resized.

    Args:
        params: ``bundle.params`` of an M2-Encoder, ``bundle.params["vision"]`` of a model of the
            CLIP family whose pooling is by a class token.
        cfg: of the model to start; width, layers, heads and patch size must be the tower's.
        rng: of what the tower has not.

    Raises:
        UserError: a tower without a class token, or sizes that differ.
    """
    fresh = nnx.to_pure_dict(nnx.state(ClassTokenTower(nnx.Rngs(params=rng), cfg)))
    if cfg.family == "m2":
        taken, table, first = _of_m2(params, cfg), params["image_positions"], POSITION_OFFSET + 1
    else:
        taken, table, first = _of_plain(params, cfg), params["positions"], 1
    taken["cls_tokens"] = jnp.broadcast_to(taken["cls_tokens"], fresh["cls_tokens"].shape)
    taken.setdefault("bias", jnp.zeros_like(fresh["bias"]))
    made = fresh | taken
    found = [jax.tree.map(jnp.shape, tree) for tree in (made, fresh)]
    if jax.tree.structure(made) != jax.tree.structure(fresh) or found[0] != found[1]:
        raise UserError(
            "class tokens: the tower's width, layers or patch size differ from the config's: "
            "make them equal"
        )
    made["positions"] = resized_positions(table, first, cfg.grid, fresh["positions"])
    return jax.tree.map(lambda leaf, as_: jnp.array(leaf, as_.dtype), made, fresh)


def _of_plain(params: Params, cfg: ClassTokens) -> Params:
    """What is taken over from a tower of the CLIP family."""
    if "cls_token" not in params:
        raise UserError(f"class tokens: the tower has no class token: {_START}")
    if ("pre_norm" in params) != cfg.pre_norm:
        raise UserError(
            f"class tokens: pre_norm={cfg.pre_norm} but the tower has "
            f"{'one' if 'pre_norm' in params else 'none'}: change it"
        )
    same = ("kernel", "bias", "stack", "norm", "pre_norm")
    taken = {name: params[name] for name in same if name in params}
    return {**taken, "cls_tokens": params["cls_token"]}


def _of_m2(params: Params, cfg: ClassTokens) -> Params:
    """What is taken over from an M2-Encoder: its patches and its A weights."""
    if "vision_embed" not in params:
        raise UserError(f"class tokens: no parameters of an M2-Encoder: {_START}")
    embed, parts = params["vision_embed"], ("backbone", "vl") if cfg.vl_layers else ("backbone",)
    ways = {
        part: {"blocks": params[part]["blocks"]["A"], "norm": params[part]["norms"]["A"]}
        for part in parts
    }
    taken = {name: embed[name] for name in ("kernel", "bias")}
    return {**taken, **ways, "cls_tokens": embed["cls_token"]}
