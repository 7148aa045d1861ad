# SPDX-License-Identifier: Apache-2.0
"""The multiway transformer encoder of M2-Encoder (BEiT-3, Magneto layout).

Every weight exists twice: A (vision) and B (language). A *split* says which tokens go through which
copy (spec section 3): ``ALL_A`` all through A, ``ALL_B`` all through B, s > 0 the first s tokens
through A and the rest through B. Only the softmax over the tokens is shared.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from m2jax import config as config_lib
from m2jax.dist.sharding import constrain
from m2jax.models import fused_attention, layers

ALL_A = -1
ALL_B = 0
BLOCKED = -1e8  # what the release adds to a blocked score (spec section 5)


class Encoded(NamedTuple):
    """What an encoder returns."""

    tokens: Float[Array, "batch length width"]  # after the last layer norm
    layers: Float[Array, "layers batch length width"] | None  # before it, when captured


def branches(tokens: jax.Array, split: int) -> list[tuple[str, jax.Array]]:
    """The tokens each copy sees: [("A", ...)], [("B", ...)] or both, in order."""
    if split == ALL_A:
        return [("A", tokens)]
    if split == ALL_B:
        return [("B", tokens)]
    return [("A", tokens[:, :split]), ("B", tokens[:, split:])]


class Block(nnx.Module):
    """One modality's weights of a stack of pre-norm layers with inner norms (spec section 5)."""

    def __init__(self, rngs: nnx.Rngs, cfg: config_lib.Model, depth: int):
        d, f, dtype = cfg.width, 4 * cfg.width, jnp.dtype(cfg.param_dtype)
        stack = (depth,)
        # Spec section 8: value, output and ffn weights grow with the depth of their own encoder.
        gain = math.sqrt(math.log(2 * depth))

        def linear(shape: tuple[int, int], axes: tuple[str, str], scale: float) -> layers.Linear:
            if cfg.init == "torch":
                bound = scale * shape[0] ** -0.5
                init, bias_init = layers.uniform(bound), layers.uniform(bound)
            else:
                init, bias_init = layers.normal(shape[0] ** -0.5), layers.constant(0.0)
            return layers.Linear(
                rngs, shape, axes, init=init, bias_init=bias_init, stack=stack, dtype=dtype,
                products=cfg.products,
            )  # fmt: skip

        def norm(width: int, axis: str | None = None) -> layers.LayerNorm:
            return layers.LayerNorm(rngs, width, axis=axis, stack=stack, dtype=dtype)

        self.head_dim, self.fused_qkv = cfg.width // cfg.heads, cfg.fused_qkv
        self.attn_norm = norm(d)
        self.q = linear((d, d), ("embed", "heads"), 1.0)
        self.k = linear((d, d), ("embed", "heads"), 1.0)
        self.v = linear((d, d), ("embed", "heads"), gain)
        self.inner_norm = norm(d, "heads")
        self.out = linear((d, d), ("heads", "embed"), gain)
        self.ffn_norm = norm(d)
        self.fc1 = linear((d, f), ("embed", "mlp"), gain)
        self.mlp_norm = norm(f, "mlp")
        self.fc2 = linear((f, d), ("mlp", "embed"), gain)

    @jax.named_scope("qkv")
    def project(self, x: Float[Array, "b l d"]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values, each [b, l, heads, head_dim]."""
        project = layers.normed(self.attn_norm, self.q, self.k, self.v, fused=self.fused_qkv)
        projected = [checkpoint_name(y, "qkv") for y in project(x)]
        q, k, v = (y.reshape(*x.shape[:2], -1, self.head_dim) for y in projected)
        return q, k, v

    @jax.named_scope("out")
    def merge(self, heads: Float[Array, "b l h k"]) -> Float[Array, "b l d"]:
        """Norm over all channels of the merged heads, then the output projection."""
        merged = heads.reshape(*heads.shape[:2], -1)
        return checkpoint_name(layers.normed(self.inner_norm, self.out)(merged)[0], "attention_out")

    @jax.named_scope("ffn")
    def feed_forward(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        """fc2(LN(gelu(fc1(LN(x))))), the exact (erf) GELU."""
        h = checkpoint_name(layers.normed(self.ffn_norm, self.fc1)(x)[0], "ffn_in")
        h = layers.gelu(h)
        return layers.normed(self.mlp_norm, self.fc2)(h)[0]


class Encoder(nnx.Module):
    """A stack of multiway layers and its last (multiway) layer norm."""

    def __init__(self, rngs: nnx.Rngs, cfg: config_lib.Model, depth: int):
        dtype = jnp.dtype(cfg.param_dtype)
        self.cfg = cfg
        self.depth = depth
        self.blocks = nnx.Dict({way: Block(rngs, cfg, depth) for way in "AB"})
        self.norms = nnx.Dict({way: layers.LayerNorm(rngs, cfg.width, dtype=dtype) for way in "AB"})

    def __call__(
        self,
        tokens: Float[Array, "batch length width"],
        *,
        split: int,
        token_mask: Float[Array, "batch length"] | None = None,
        blocked: Float[Array, "#batch length length"] | None = None,
        rng: jax.Array | None = None,
        capture: bool = False,
    ) -> Encoded:
        """Runs the stack.

        Args:
            tokens: embedded tokens, positions added.
            split: ``ALL_A``, ``ALL_B`` or the number of leading tokens that take A weights.
            token_mask: 1 for tokens, 0 for padding; padding is zeroed and never attended to.
            blocked: nonzero where query i must not see key j.
            rng: switches drop path on.
            capture: also return every layer's output.
        """
        if token_mask is not None:
            tokens = tokens * token_mask[..., None].astype(tokens.dtype)
        length, attend = tokens.shape[1], layers.ATTENTION[self.cfg.attention]
        cudnn = self.cfg.attention == "cudnn"
        if cudnn:
            tokens, token_mask, blocked = fused_attention.filled(tokens, token_mask, blocked)
            attend = functools.partial(attend, length=length)
        ways = [way for way, _ in branches(tokens, split)]
        graphs, states = zip(*(nnx.split(self.blocks[way]) for way in ways), strict=True)
        layer = layers.rematerialise(
            self._layer(
                split,
                dict(zip(ways, graphs, strict=True)),
                functools.partial(attend, bias=_score_bias(token_mask, blocked)),
            ),
            self.cfg.remat,
        )
        rates = self.cfg.drop_path * jnp.linspace(0.0, 1.0, self.depth)
        rngs = None if rng is None else jax.random.split(rng, self.depth)

        def body(x, scanned):
            x = constrain(layer(x, *scanned), ("batch", None, None))
            x = fused_attention.row_major(x) if cudnn else x
            return x, (x[:, :length] if capture else None)

        unroll = min(self.cfg.unroll, self.depth)
        scanned = (dict(zip(ways, states, strict=True)), rates, rngs)
        tokens, outputs = jax.lax.scan(body, tokens, scanned, unroll=unroll)
        normed = [self.norms[way](part) for way, part in branches(tokens[:, :length], split)]
        return Encoded(_join(normed), outputs)

    def _layer(
        self, split: int, graphs: dict[str, nnx.GraphDef], attend: Callable[..., jax.Array]
    ) -> Callable[..., jax.Array]:
        """The function of one layer: (x, its weights by way, drop rate, rng) -> x."""
        drops = self.cfg.drop_path > 0

        def layer(x, weights, rate, rng):
            blocks = {way: nnx.merge(graph, weights[way]) for way, graph in graphs.items()}

            def residual(branch, index):
                if rng is None or not drops:
                    return branch
                return layers.drop_path(branch, rate, jax.random.fold_in(rng, index))

            projected = [blocks[way].project(part) for way, part in branches(x, split)]
            q, k, v = (_join(list(parts)) for parts in zip(*projected, strict=True))
            heads = attend(q, k, v)
            merged = [blocks[way].merge(part) for way, part in branches(heads, split)]
            x = x + residual(_join(merged), 0)
            fed = [blocks[way].feed_forward(part) for way, part in branches(x, split)]
            return x + residual(_join(fed), 1)

        return layer


class OneWay(nnx.Module):
    """The A weights of an encoder alone, with its last norm: what images go through.

    Args:
        rngs: source of the initial values.
        width: of the tokens.
        heads: of attention.
        depth: layers.
        remat: what the backward pass recomputes.
    """

    def __init__(self, rngs: nnx.Rngs, *, width: int, heads: int, depth: int, remat: str = "none"):
        cfg = config_lib.Model(width=width, heads=heads, init="scaled")
        self.blocks = Block(rngs, cfg, depth)
        self.norm = layers.LayerNorm(rngs, width)
        self.remat = remat

    def __call__(self, tokens: Float[Array, "batch length width"]) -> Float[Array, "b l w"]:
        """Runs every layer and the norm."""
        graph, state = nnx.split(self.blocks)

        def layer(x: jax.Array, weights: nnx.State) -> jax.Array:
            block = nnx.merge(graph, weights)
            x = x + block.merge(layers.attention(*block.project(x)))
            return x + block.feed_forward(x)

        run = layers.rematerialise(layer, self.remat)

        def body(x: jax.Array, weights: nnx.State) -> tuple[jax.Array, None]:
            return constrain(run(x, weights), ("batch", None, None)), None

        return self.norm(jax.lax.scan(body, tokens, state)[0])


def _join(parts: list[jax.Array]) -> jax.Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def _score_bias(token_mask: jax.Array | None, blocked: jax.Array | None) -> jax.Array | None:
    """Added to the scores [batch, 1, queries, keys]: -inf at padding, -1e8 where blocked."""
    bias = None
    if token_mask is not None:
        bias = jnp.where(token_mask != 0, 0.0, -jnp.inf)[:, None, None, :]
    if blocked is not None:
        extra = jnp.where(blocked != 0, BLOCKED, 0.0)[:, None]
        bias = extra if bias is None else bias + extra
    return bias
