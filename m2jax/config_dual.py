# SPDX-License-Identifier: Apache-2.0
"""What a dual encoder of the CLIP family is made of: CLIP, SigLIP, SigLIP 2, Chinese-CLIP.

Two transformers that meet only in the loss. The defaults are OpenAI's ViT-B/32; an importer fills
every field from the release's own config. This module never imports jax.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field

from m2jax.architectures import MOST, MOST_LAYERS, MOST_PIXELS
from m2jax.config import ATTENTION, Model, UserError, from_mapping

FAMILIES = ("clip", "siglip", "chinese-clip")

_CHOICES = {
    "activation": ("quick_gelu", "gelu", "gelu_tanh"),
    "image_pooling": ("cls", "map"),
    "text_pooling": ("argmax", "eos", "last", "first"),
    "dtype": ("bfloat16", "float32", "float64"),
    "param_dtype": ("bfloat16", "float16", "float32", "float64"),
    "attention": tuple(ATTENTION),
    "remat": ("none", "full", "dots"),
}


@dataclass(frozen=True, kw_only=True)
class Tower:
    """One transformer."""

    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    activation: str = "quick_gelu"  # quick_gelu (x sigmoid(1.702 x)) | gelu (erf) | gelu_tanh
    eps: float = 1e-5  # of every layer norm


@dataclass(frozen=True, kw_only=True)
class Vision(Tower):
    """A pre-norm vision transformer."""

    image_size: int = 224  # pixels, square; what is left over a whole patch is not seen
    patch_size: int = 32  # pixels
    patch_bias: bool = False  # of the patch embedding
    pre_norm: bool = True  # a norm between the embedding and the first layer (CLIP's ln_pre)
    pooling: str = "cls"  # cls (a class token goes in front) | map (attention pooling, no token)
    projection: bool = True  # a linear map to the features
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)  # of RGB in [0, 1]
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class Text(Tower):
    """A text transformer: pre-norm with a final norm, or BERT's post-norm."""

    width: int = 512
    heads: int = 8
    mlp_width: int = 2048
    vocab_size: int = 49408
    positions: int = 77  # rows of the position table: the longest text in tokens
    causal: bool = True
    masked: bool = False  # padding is hidden from attention; elsewhere it is attended to
    pooling: str = "argmax"  # argmax of the ids | eos (the first eos_id) | last | first
    eos_id: int = 49407  # read by pooling=eos alone
    token_types: int = 0  # rows of BERT's segment table; text is segment 0
    post_norm: bool = False  # BERT: norms after the branches and the embedding, none at the end
    head_bias: bool = False  # of the map to the features


@dataclass(frozen=True, kw_only=True)
class Dual:
    """A dual encoder."""

    family: str = "clip"  # the layout it goes back out to: a row of FAMILIES
    vision: Vision = field(default_factory=Vision)
    text: Text = field(default_factory=Text)
    out_dim: int = 512  # of the features
    logit_bias: bool = False  # SigLIP's, added to the scaled cosines
    dtype: str = "float32"  # of activations; normalisation and softmax are >= float32
    param_dtype: str = "float32"
    attention: str = "batch"  # a key of ATTENTION
    remat: str = "none"  # none | full | dots: what the backward pass recomputes
    unroll: int = 1  # layers per iteration of the scan; >= the depth unrolls it

    @property
    def name(self) -> str:
        """What messages call the model."""
        return self.family


Architecture = Model | Dual


def check(cfg: Dual, where: str = "config") -> Dual:
    """Returns ``cfg`` when its parts fit together.

    Raises:
        UserError: a value of the wrong type or out of its choices, a size below 1, or sizes that
            do not fit.
    """
    cfg = from_mapping(Dual, dataclasses.asdict(cfg), where)  # every value is of its type
    choices = [
        ("family", cfg.family, FAMILIES),
        ("vision.activation", cfg.vision.activation, _CHOICES["activation"]),
        ("text.activation", cfg.text.activation, _CHOICES["activation"]),
        ("vision.pooling", cfg.vision.pooling, _CHOICES["image_pooling"]),
        ("text.pooling", cfg.text.pooling, _CHOICES["text_pooling"]),
        ("dtype", cfg.dtype, _CHOICES["dtype"]),
        ("param_dtype", cfg.param_dtype, _CHOICES["param_dtype"]),
        ("attention", cfg.attention, _CHOICES["attention"]),
        ("remat", cfg.remat, _CHOICES["remat"]),
    ]
    for key, value, allowed in choices:
        if value not in allowed:
            raise UserError(f"{where}: {key}={value!r}: no such choice: use {', '.join(allowed)}")
    for name, tower in (("vision", cfg.vision), ("text", cfg.text)):
        for key, size in dataclasses.asdict(tower).items():
            least = 0 if key in ("token_types", "eos_id") else 1
            most = {"layers": MOST_LAYERS, "image_size": MOST_PIXELS}.get(key, MOST)
            if type(size) is int and not least <= size <= most:
                raise UserError(
                    f"{where}: {name}.{key}={size}: must lie between {least} and {most}: mend the "
                    "config"
                )
        if tower.width % tower.heads:
            raise UserError(
                f"{where}: {name}.width={tower.width}: not a multiple of {name}.heads="
                f"{tower.heads}: mend the config"
            )
    if cfg.vision.image_size < cfg.vision.patch_size:
        raise UserError(
            f"{where}: vision.image_size={cfg.vision.image_size}: smaller than vision.patch_size="
            f"{cfg.vision.patch_size}: mend the config"
        )
    for key, numbers in (("mean", cfg.vision.mean), ("std", cfg.vision.std)):
        if len(numbers) != 3 or not all(type(x) in (int, float) for x in numbers):
            raise UserError(f"{where}: vision.{key}={numbers!r}: expected three numbers")
    if min(cfg.vision.std) <= 0:
        raise UserError(f"{where}: vision.std={cfg.vision.std!r}: must be above 0: mend it")
    if not cfg.vision.projection and cfg.vision.width != cfg.out_dim:
        raise UserError(
            f"{where}: vision.width={cfg.vision.width}: without a projection it must equal "
            f"out_dim={cfg.out_dim}: mend the config"
        )
    return cfg


def to_json(cfg: Dual) -> str:
    """The text a model folder keeps."""
    return json.dumps(dataclasses.asdict(cfg), indent=1, sort_keys=True) + "\n"


def from_json(text: str, where: str = "config.json") -> Dual:
    """Inverse of ``to_json``; ``where`` names the source in errors.

    Raises:
        UserError: no JSON object, an unknown key, a wrong type, or sizes that do not fit.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}): restore it from a backup") from None
    return check(from_mapping(Dual, values, where), where)
