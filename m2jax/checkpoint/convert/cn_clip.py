# SPDX-License-Identifier: Apache-2.0
"""The config of an original Chinese-CLIP (cn_clip) checkpoint, read off its shapes.

Such a file names no config; the authors' code knows it from the model's name. Sizes follow from the
shapes, and what does not (activations, epsilons, width of a head) is the same in all releases but
for ViT-H, whose vision heads are 80 wide. Source: OFA-Sys/Chinese-CLIP, cn_clip/clip/model.py and
model_configs (ViT-H-14.json).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from m2jax.config import UserError
from m2jax.config_dual import Dual, Text, Vision, check

HEAD_WIDTH = 64
WIDE_HEADS = {1280: 80}  # vision width -> width of a head

Shapes = Mapping[str, tuple[int, ...]]


def is_ours(shapes: Shapes) -> bool:
    """Whether tensor names are those of a cn_clip checkpoint."""
    return "visual.conv1.weight" in shapes and "bert.embeddings.word_embeddings.weight" in shapes


def infer(shapes: Shapes, where: str) -> Dual:
    """The config of a checkpoint with these shapes.

    Raises:
        UserError: a ResNet, or a tensor whose shape says the sizes is missing.
    """
    if "visual.layer1.0.conv1.weight" in shapes:
        raise UserError(f"{where}: a ResNet vision tower: only the ViT releases are supported")
    try:
        vision_width, _, patch, _ = shapes["visual.conv1.weight"]
        rows = shapes["visual.positional_embedding"][0]
        vocab, text_width = shapes["bert.embeddings.word_embeddings.weight"]
        vision = Vision(
            width=vision_width,
            layers=_depth(shapes, "visual.transformer.resblocks.{n}.attn.in_proj_weight"),
            heads=max(1, vision_width // WIDE_HEADS.get(vision_width, HEAD_WIDTH)),
            mlp_width=shapes["visual.transformer.resblocks.0.mlp.c_fc.weight"][0],
            image_size=math.isqrt(rows - 1) * patch,
            patch_size=patch,
        )
        text = Text(
            width=text_width,
            layers=_depth(shapes, "bert.encoder.layer.{n}.attention.self.query.weight"),
            heads=max(1, text_width // HEAD_WIDTH),
            mlp_width=shapes["bert.encoder.layer.0.intermediate.dense.weight"][0],
            activation="gelu",
            eps=1e-12,
            vocab_size=vocab,
            positions=shapes["bert.embeddings.position_embeddings.weight"][0],
            causal=False,
            masked=True,
            pooling="first",
            token_types=shapes["bert.embeddings.token_type_embeddings.weight"][0],
            post_norm=True,
        )
        cfg = Dual(
            family="chinese-clip", vision=vision, text=text, out_dim=shapes["text_projection"][1]
        )
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"{where}: no Chinese-CLIP of known layout ({error}): get a sound copy"
        ) from None
    return check(cfg, where)


def _depth(shapes: Shapes, name: str) -> int:
    """Number of layers: how many of these names are there from 0 on."""
    layer = 0
    while name.format(n=layer) in shapes:
        layer += 1
    return layer
