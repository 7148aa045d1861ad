# SPDX-License-Identifier: Apache-2.0
"""The forward of CLIP, SigLIP and Chinese-CLIP in NumPy, over a release's own tensors.

It shares no code with ``m2jax.models`` and no table with ``dual_names``: an import is checked
against it. Float64 throughout, one matrix in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import erf

from m2jax.config_dual import Dual, Tower, Vision

Hidden = Float[np.ndarray, "batch tokens width"]
Read = Callable[[str], np.ndarray]  # the float64 tensor of a release's name

_ACTIVATIONS = {
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "gelu": lambda x: x * (1 + erf(x / np.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2,
}


class Names(NamedTuple):
    """What one library calls the parts of a layer."""

    layer: str
    norm1: str
    qkv: tuple[str, ...]  # three linear maps, or one that holds all
    out: str
    norm2: str
    fc1: str
    fc2: str


_HF = ("layer_norm1", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
       "self_attn.out_proj", "layer_norm2", "mlp.fc1", "mlp.fc2")  # fmt: skip
_OPENAI = ("ln_1", ("attn.in_proj_",), "attn.out_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
_TIMM = ("norm1", ("attn.qkv",), "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
_BERT = ("attention.output.LayerNorm", ("attention.self.query", "attention.self.key",
         "attention.self.value"), "attention.output.dense", "output.LayerNorm",
         "intermediate.dense", "output.dense")  # fmt: skip


class Reference:
    """A model, reading one tensor at a time.

    Args:
        read: the float64 tensor of a name of the release.
        cfg: its config.
        layout: ``hf`` or ``open-clip``.
    """

    def __init__(self, read: Read, cfg: Dual, layout: str) -> None:
        self._read, self._cfg, self._hf = read, cfg, layout == "hf"

    def image(self, pixels: Float[np.ndarray, "batch side side 3"]) -> np.ndarray:
        """Unit features of images in [0, 1]."""
        vision = self._cfg.vision
        x = (pixels.astype(np.float64) - vision.mean) / np.array(vision.std)
        if self._cfg.family == "siglip" and not self._hf:
            return _unit(self._timm(x))
        at = "vision_model.embeddings." if self._hf else "visual."
        patch = "patch_embedding" if self._hf else "conv1"
        tokens = self._patches(f"{at}{patch}", x)
        if vision.pooling == "cls":
            first = self._read(f"{at}class_embedding")
            first = np.broadcast_to(first, (len(x), 1, first.size))
            tokens = np.concatenate([first, tokens], 1)
        tokens = tokens + self._read(
            f"{at}position_embedding.weight" if self._hf else f"{at}positional_embedding"
        )
        if vision.pre_norm:
            name = "vision_model.pre_layrnorm" if self._hf else "visual.ln_pre"
            tokens = self._norm(name, tokens, vision.eps)
        tokens = self._layers(tokens, vision, self._names("vision_model", "visual.transformer"))
        last = "vision_model.post_layernorm" if self._hf else "visual.ln_post"
        tokens = self._norm(last, tokens, vision.eps)
        if vision.pooling == "map":
            head = "vision_model.head"
            pooled = self._pool(
                tokens,
                self._read(f"{head}.probe"),
                [f"{head}.attention.in_proj_"],
                [f"{head}.{x}" for x in ("attention.out_proj", "layernorm", "mlp.fc1", "mlp.fc2")],
            )
        else:
            pooled = tokens[:, 0]
        if vision.projection:
            matrix = self._read("visual_projection.weight").T if self._hf else None
            pooled = pooled @ (self._read("visual.proj") if matrix is None else matrix)
        return _unit(pooled)

    def text(
        self,
        embed: Callable[[str, Int[np.ndarray, ...]], np.ndarray],
        ids: Int[np.ndarray, "batch length"],
        mask: Bool[np.ndarray, "batch length"],
    ) -> np.ndarray:
        """Unit features of texts; ``embed`` looks up rows of a token table by name."""
        text, length = self._cfg.text, ids.shape[1]
        blocked = np.zeros((1, 1, length, length), bool)
        if text.causal:
            blocked = blocked | ~np.tri(length, dtype=bool)
        if text.masked:
            blocked = blocked | ~mask[:, None, None, :].astype(bool)
        if text.post_norm:
            return self._bert(embed, ids, blocked)
        prefix = "text." if self._cfg.family == "siglip" else ""
        at = "text_model.embeddings." if self._hf else prefix
        x = (
            embed(f"{at}token_embedding.weight", ids)
            + self._read(
                f"{at}position_embedding.weight" if self._hf else f"{at}positional_embedding"
            )[:length]
        )
        x = self._layers(x, text, self._names("text_model", f"{prefix}transformer"), blocked)
        last = "text_model.final_layer_norm" if self._hf else f"{prefix}ln_final"
        place = {
            "argmax": ids.argmax(1),
            "eos": (ids == text.eos_id).argmax(1),
            "last": np.full(len(ids), length - 1),
            "first": np.zeros(len(ids), int),
        }[text.pooling]
        pooled = self._norm(last, x, text.eps)[np.arange(len(ids)), place]
        if text.head_bias:
            head = "text_model.head" if self._hf else f"{prefix}text_projection"
            return _unit(self._linear(head, pooled))
        return _unit(pooled @ self._text_head())

    def scales(self) -> np.ndarray:
        """``logit_scale`` and, where there is one, ``logit_bias``."""
        names = ("logit_scale", "logit_bias") if self._cfg.logit_bias else ("logit_scale",)
        return np.array([[float(self._read(name).reshape(())) for name in names]])

    def _text_head(self) -> np.ndarray:
        return self._read("text_projection.weight").T if self._hf else self._read("text_projection")

    def _bert(self, embed, ids, blocked) -> np.ndarray:
        at, eps = "text_model" if self._hf else "bert", self._cfg.text.eps
        table = f"{at}.embeddings"
        x = embed(f"{table}.word_embeddings.weight", ids)
        x = x + self._read(f"{table}.position_embeddings.weight")[: ids.shape[1]]
        if self._cfg.text.token_types:
            x = x + self._read(f"{table}.token_type_embeddings.weight")[0]
        x = self._norm(f"{table}.LayerNorm", x, eps)
        names = Names(f"{at}.encoder.layer.{{}}.", *_BERT)
        for index in range(self._cfg.text.layers):
            layer = names.layer.format(index)
            x = self._norm(
                layer + names.norm1, x + self._attend(layer, names, x, self._cfg.text, blocked), eps
            )
            x = self._norm(
                layer + names.norm2, x + self._feed(layer, names, x, self._cfg.text), eps
            )
        return _unit(x[:, 0] @ self._text_head())

    def _timm(self, x: np.ndarray) -> np.ndarray:
        vision, at = self._cfg.vision, "visual.trunk"
        tokens = self._patches(f"{at}.patch_embed.proj", x) + self._read(f"{at}.pos_embed")
        tokens = self._layers(tokens, vision, Names(f"{at}.blocks.{{}}.", *_TIMM))
        tokens, pool = self._norm(f"{at}.norm", tokens, vision.eps), f"{at}.attn_pool"
        rest = [f"{pool}.{name}" for name in ("proj", "norm", "mlp.fc1", "mlp.fc2")]
        latent = self._read(f"{pool}.latent")
        return self._pool(tokens, latent, [f"{pool}.q", f"{pool}.kv"], rest)

    def _names(self, hf: str, other: str) -> Names:
        if self._hf:
            return Names(f"{hf}.encoder.layers.{{}}.", *_HF)
        return Names(f"{other}.resblocks.{{}}.", *_OPENAI)

    def _patches(self, name: str, x: np.ndarray) -> Hidden:
        """The patch embedding, each window times the kernel [out, 3, p, p]."""
        kernel, p = self._read(f"{name}.weight"), self._cfg.vision.patch_size
        side = self._cfg.vision.image_size // p
        tokens = np.empty((len(x), side, side, len(kernel)))
        for row in range(side):
            for column in range(side):
                window = x[:, row * p : (row + 1) * p, column * p : (column + 1) * p]
                tokens[:, row, column] = np.einsum("bijc,ocij->bo", window, kernel, optimize=True)
        tokens = tokens.reshape(len(x), -1, len(kernel))
        return tokens + self._read(f"{name}.bias") if self._cfg.vision.patch_bias else tokens

    def _layers(self, x: Hidden, tower: Tower, names: Names, blocked=None) -> Hidden:
        for index in range(tower.layers):
            layer = names.layer.format(index)
            h = self._norm(layer + names.norm1, x, tower.eps)
            x = x + self._attend(layer, names, h, tower, blocked)
            h = self._norm(layer + names.norm2, x, tower.eps)
            x = x + self._feed(layer, names, h, tower)
        return x

    def _attend(self, layer: str, names: Names, x: Hidden, tower: Tower, blocked) -> Hidden:
        parts = [self._linear(layer + name, x) for name in names.qkv]
        q, k, v = parts if len(parts) == 3 else np.split(parts[0], 3, axis=-1)
        return self._linear(layer + names.out, _attention(q, k, v, tower.heads, blocked))

    def _feed(self, layer: str, names: Names, x: Hidden, tower: Tower) -> Hidden:
        hidden = _ACTIVATIONS[tower.activation](self._linear(layer + names.fc1, x))
        return self._linear(layer + names.fc2, hidden)

    def _pool(
        self, tokens: Hidden, probe: np.ndarray, maps: list[str], rest: list[str]
    ) -> np.ndarray:
        """SigLIP's attention pooling; ``maps``: one map of q, k and v, or one of q, one of both."""
        vision: Vision = self._cfg.vision
        query = np.broadcast_to(probe, (len(tokens), 1, probe.shape[-1]))
        if len(maps) == 1:
            q = np.split(self._linear(maps[0], query), 3, axis=-1)[0]
            _, k, v = np.split(self._linear(maps[0], tokens), 3, axis=-1)
        else:
            q = self._linear(maps[0], query)
            k, v = np.split(self._linear(maps[1], tokens), 2, axis=-1)
        out, norm, fc1, fc2 = rest
        x = self._linear(out, _attention(q, k, v, vision.heads, None))
        hidden = self._linear(fc1, self._norm(norm, x, vision.eps))
        return (x + self._linear(fc2, _ACTIVATIONS[vision.activation](hidden)))[:, 0]

    def _linear(self, name: str, x: np.ndarray) -> np.ndarray:
        dot = "" if name.endswith("_") else "."  # torch's fused maps: in_proj_weight
        return x @ self._read(f"{name}{dot}weight").T + self._read(f"{name}{dot}bias")

    def _norm(self, name: str, x: np.ndarray, eps: float) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        y = centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + eps)
        return y * self._read(f"{name}.weight") + self._read(f"{name}.bias")


def _attention(q: Hidden, k: Hidden, v: Hidden, heads: int, blocked: np.ndarray | None) -> Hidden:
    q, k, v = (x.reshape(*x.shape[:2], heads, -1) for x in (q, k, v))
    scores = np.einsum("bqhd,bkhd->bhqk", q, k, optimize=True) / np.sqrt(q.shape[-1])
    if blocked is not None:
        scores = np.where(blocked, np.finfo(np.float32).min, scores)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    merged = np.einsum("bhqk,bkhd->bqhd", weights, v, optimize=True)
    return merged.reshape(*merged.shape[:2], -1)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).sum(-1, keepdims=True))
