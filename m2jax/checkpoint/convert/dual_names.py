# SPDX-License-Identifier: Apache-2.0
"""Where each tensor of a CLIP, SigLIP or Chinese-CLIP release lives here.

One table per layout: ``name there -> Rule(names here, turn)``, with ``{n}`` for the layer.
``slots`` fills in the layers and leaves out what a config does not have, so a table is at once the
list of names a file must hold, the way in and the way out. Layouts: ``hf`` (transformers) and
``open-clip`` (open_clip's; for Chinese-CLIP, which open_clip cannot hold, the authors' cn_clip).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Shaped

from m2jax.config_dual import Dual

LAYOUTS = ("hf", "open-clip")

# Names of files that no forward pass of these models reads: buffers, and BERT's unused pooler.
IGNORED = re.compile(
    r"(.*\.)?position_ids|(text_model|bert)\.pooler\..*"
    r"|input_resolution|context_length|vocab_size"
)


class Rule(NamedTuple):
    """How one tensor there becomes one or more parameters here."""

    names: tuple[str, ...]  # more than one: the tensor is their concatenation on its first axis
    turn: str = ""  # "" as it is | "T" transpose | "conv" [out, in, h, w] -> [h, w, in, out]
    ones: int = 0  # leading axes of size 1 that only the file has


class Slot(NamedTuple):
    """A rule made definite: the layer it fills and the rows that count."""

    rule: Rule
    layer: int | None  # index on the stacked axis
    rows: int | None = None  # rows that count, where the table here is padded

    def inward(self, tensor: Shaped[np.ndarray, ...]) -> list[Shaped[np.ndarray, ...]]:
        """The file's tensor as our parameters, in the order of the rule's names."""
        tensor = tensor.reshape(tensor.shape[self.rule.ones :])
        fused = len(self.rule.names) > 1
        parts = np.split(tensor, len(self.rule.names)) if fused else [tensor]
        return [_TURNS[self.rule.turn](part) for part in parts]

    def shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the file's tensor, from that of (each of) our parameters."""
        turned = {"": range(len(ours)), "T": (1, 0), "conv": (3, 2, 0, 1)}[self.rule.turn]
        shape = tuple(ours[axis] for axis in turned)
        if len(self.rule.names) > 1:
            shape = (len(self.rule.names) * shape[0], *shape[1:])
        return (1,) * self.rule.ones + shape

    def outward(self, arrays: list[Shaped[np.ndarray, ...]]) -> Shaped[np.ndarray, ...]:
        """Our parameters as the file's tensor."""
        parts = [_BACK[self.rule.turn](array) for array in arrays]
        tensor = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return tensor.reshape((1,) * self.rule.ones + tensor.shape)


_TURNS = {"": lambda x: x, "T": np.transpose, "conv": lambda x: x.transpose(2, 3, 1, 0)}
_BACK = {"": lambda x: x, "T": np.transpose, "conv": lambda x: x.transpose(3, 2, 0, 1)}

Table = dict[str, Rule]


def slots(cfg: Dual, layout: str) -> Mapping[str, Slot]:
    """Every name of a model of this config in this layout, with its place.

    Args:
        cfg: a checked config.
        layout: one of ``LAYOUTS``.
    """
    depth = {"vision": cfg.vision.layers, "text": cfg.text.layers}
    absent = _absent(cfg)
    found = {}
    for name, rule in _TABLES[cfg.family, layout].items():
        if any(ours.startswith(absent) for ours in rule.names):
            continue
        rows = cfg.text.vocab_size if rule.names == ("text.embed",) else None
        if "{n}" not in name:
            found[name] = Slot(rule, None, rows)
            continue
        for layer in range(depth[rule.names[0].partition(".")[0]]):
            found[name.format(n=layer)] = Slot(rule, layer)
    return found


def _absent(cfg: Dual) -> tuple[str, ...]:
    """Beginnings of parameter names that a model of this config has not."""
    has = {
        "vision.bias": cfg.vision.patch_bias,
        "vision.pre_norm": cfg.vision.pre_norm,
        "vision.cls_token": cfg.vision.pooling == "cls",
        "vision.pool.": cfg.vision.pooling == "map",
        "vision.head": cfg.vision.projection,
        "text.types": cfg.text.token_types > 0,
        "text.head.bias": cfg.text.head_bias,
        "logit_bias": cfg.logit_bias,
    }
    return tuple(name for name, present in has.items() if not present)


def _linear(theirs: str, *ours: str) -> Table:
    """A torch ``Linear``; more than one of ours: their outputs side by side in one of theirs."""
    return {
        f"{theirs}.weight": Rule(tuple(f"{name}.kernel" for name in ours), "T"),
        f"{theirs}.bias": Rule(tuple(f"{name}.bias" for name in ours)),
    }


def _in_proj(theirs: str, ours: str) -> Table:
    """The fused input projection of torch's ``MultiheadAttention``."""
    return {
        f"{theirs}.in_proj_weight": Rule(tuple(f"{ours}.{x}.kernel" for x in "qkv"), "T"),
        f"{theirs}.in_proj_bias": Rule(tuple(f"{ours}.{x}.bias" for x in "qkv")),
    }


def _norm(theirs: str, ours: str) -> Table:
    return {f"{theirs}.weight": Rule((f"{ours}.scale",)), f"{theirs}.bias": Rule((f"{ours}.bias",))}


def _hf_layers(theirs: str, ours: str) -> Table:
    """A stack of transformers' CLIP and SigLIP layers."""
    at, to = f"{theirs}.encoder.layers.{{n}}", f"{ours}.stack.blocks"
    table = _norm(f"{at}.layer_norm1", f"{to}.attn_norm")
    for x in "qkv":
        table |= _linear(f"{at}.self_attn.{x}_proj", f"{to}.{x}")
    table |= _linear(f"{at}.self_attn.out_proj", f"{to}.out")
    table |= _norm(f"{at}.layer_norm2", f"{to}.ffn_norm")
    return table | _linear(f"{at}.mlp.fc1", f"{to}.fc1") | _linear(f"{at}.mlp.fc2", f"{to}.fc2")


def _openai_layers(theirs: str, ours: str) -> Table:
    """A stack of OpenAI's residual attention blocks."""
    at, to = f"{theirs}.resblocks.{{n}}", f"{ours}.stack.blocks"
    table = _norm(f"{at}.ln_1", f"{to}.attn_norm") | _in_proj(f"{at}.attn", to)
    table |= _linear(f"{at}.attn.out_proj", f"{to}.out") | _norm(f"{at}.ln_2", f"{to}.ffn_norm")
    return table | _linear(f"{at}.mlp.c_fc", f"{to}.fc1") | _linear(f"{at}.mlp.c_proj", f"{to}.fc2")


def _bert(theirs: str, *, last: Table) -> Table:
    """BERT's embedding and layers, and what the releases call the head."""
    at, to = f"{theirs}.encoder.layer.{{n}}", "text.stack.blocks"
    table = {
        f"{theirs}.embeddings.word_embeddings.weight": Rule(("text.embed",)),
        f"{theirs}.embeddings.position_embeddings.weight": Rule(("text.positions",)),
        f"{theirs}.embeddings.token_type_embeddings.weight": Rule(("text.types",)),
    }
    table |= _norm(f"{theirs}.embeddings.LayerNorm", "text.norm")
    for name in ("query", "key", "value"):
        table |= _linear(f"{at}.attention.self.{name}", f"{to}.{name[0]}")
    table |= _linear(f"{at}.attention.output.dense", f"{to}.out")
    table |= _norm(f"{at}.attention.output.LayerNorm", f"{to}.attn_norm")
    table |= _linear(f"{at}.intermediate.dense", f"{to}.fc1")
    table |= _linear(f"{at}.output.dense", f"{to}.fc2")
    return table | _norm(f"{at}.output.LayerNorm", f"{to}.ffn_norm") | last


def _hf_vision() -> Table:
    """The vision towers of transformers, all three families."""
    at, head = "vision_model", "vision_model.head"
    table = {
        f"{at}.embeddings.class_embedding": Rule(("vision.cls_token",)),
        f"{at}.embeddings.patch_embedding.weight": Rule(("vision.kernel",), "conv"),
        f"{at}.embeddings.patch_embedding.bias": Rule(("vision.bias",)),
        f"{at}.embeddings.position_embedding.weight": Rule(("vision.positions",)),
        f"{head}.probe": Rule(("vision.pool.probe",), ones=2),
        "visual_projection.weight": Rule(("vision.head.kernel",), "T"),
    }
    table |= _norm(f"{at}.pre_layrnorm", "vision.pre_norm") | _hf_layers(at, "vision")
    table |= _norm(f"{at}.post_layernorm", "vision.norm")
    table |= _in_proj(f"{head}.attention", "vision.pool")
    table |= _linear(f"{head}.attention.out_proj", "vision.pool.out")
    table |= _norm(f"{head}.layernorm", "vision.pool.norm")
    return table | _mlp(f"{head}.mlp", "vision.pool")


def _mlp(theirs: str, ours: str) -> Table:
    return _linear(f"{theirs}.fc1", f"{ours}.fc1") | _linear(f"{theirs}.fc2", f"{ours}.fc2")


def _hf_text(head: str) -> Table:
    """The CLIP and SigLIP text towers of transformers."""
    at = "text_model"
    table = {
        f"{at}.embeddings.token_embedding.weight": Rule(("text.embed",)),
        f"{at}.embeddings.position_embedding.weight": Rule(("text.positions",)),
    }
    table |= _hf_layers(at, "text") | _norm(f"{at}.final_layer_norm", "text.norm")
    return table | _linear(head, "text.head")


def _openai_vision() -> Table:
    """The vision transformer of OpenAI, open_clip and cn_clip."""
    table = {
        "visual.class_embedding": Rule(("vision.cls_token",)),
        "visual.conv1.weight": Rule(("vision.kernel",), "conv"),
        "visual.positional_embedding": Rule(("vision.positions",)),
        "visual.proj": Rule(("vision.head.kernel",)),
    }
    table |= _norm("visual.ln_pre", "vision.pre_norm") | _norm("visual.ln_post", "vision.norm")
    return table | _openai_layers("visual.transformer", "vision")


def _openai_text(prefix: str, head: Table) -> Table:
    """The text transformer of OpenAI and open_clip."""
    table = {
        f"{prefix}token_embedding.weight": Rule(("text.embed",)),
        f"{prefix}positional_embedding": Rule(("text.positions",)),
    }
    table |= _openai_layers(f"{prefix}transformer", "text")
    return table | _norm(f"{prefix}ln_final", "text.norm") | head


def _timm_vision(at: str) -> Table:
    """A timm vision transformer with attention pooling, as open_clip's SigLIP holds it."""
    blocks, to, pool = f"{at}.blocks.{{n}}", "vision.stack.blocks", f"{at}.attn_pool"
    table = {
        f"{at}.pos_embed": Rule(("vision.positions",), ones=1),
        f"{at}.patch_embed.proj.weight": Rule(("vision.kernel",), "conv"),
        f"{at}.patch_embed.proj.bias": Rule(("vision.bias",)),
        f"{pool}.latent": Rule(("vision.pool.probe",), ones=2),
    }
    table |= _norm(f"{blocks}.norm1", f"{to}.attn_norm")
    table |= _linear(f"{blocks}.attn.qkv", *(f"{to}.{x}" for x in "qkv"))
    table |= _linear(f"{blocks}.attn.proj", f"{to}.out")
    table |= _norm(f"{blocks}.norm2", f"{to}.ffn_norm") | _mlp(f"{blocks}.mlp", to)
    table |= _norm(f"{at}.norm", "vision.norm") | _linear(f"{pool}.q", "vision.pool.q")
    table |= _linear(f"{pool}.kv", "vision.pool.k", "vision.pool.v")
    table |= _linear(f"{pool}.proj", "vision.pool.out") | _norm(f"{pool}.norm", "vision.pool.norm")
    return table | _mlp(f"{pool}.mlp", "vision.pool")


def _scalars(ones: int) -> Table:
    return {name: Rule((name,), ones=ones) for name in ("logit_scale", "logit_bias")}


_HEAD_LINEAR: Table = {"text_projection.weight": Rule(("text.head.kernel",), "T")}
_HEAD_MATRIX: Table = {"text_projection": Rule(("text.head.kernel",))}
_TABLES: dict[tuple[str, str], Table] = {
    ("clip", "hf"): _hf_vision() | _hf_text("text_projection") | _scalars(0),
    ("siglip", "hf"): _hf_vision() | _hf_text("text_model.head") | _scalars(1),
    ("chinese-clip", "hf"): _hf_vision() | _bert("text_model", last=_HEAD_LINEAR) | _scalars(0),
    ("clip", "open-clip"): _openai_vision() | _openai_text("", _HEAD_MATRIX) | _scalars(0),
    ("siglip", "open-clip"): _timm_vision("visual.trunk")
    | _openai_text("text.", _linear("text.text_projection", "text.head"))
    | _scalars(0),
    ("chinese-clip", "open-clip"): _openai_vision()
    | _bert("bert", last=_HEAD_MATRIX)
    | _scalars(0),
}
