# SPDX-License-Identifier: Apache-2.0
"""The small parts every encoder is made of, each holding the weights of a whole stack of layers.

A part made with ``stack=(n,)`` owns arrays whose first axis is the layer; ``jax.lax.scan`` hands
one slice of it to each step, and the call below sees a part without that axis. Logical axis names
lie beside each array as plain metadata (``logical_axes``); ``dist.sharding`` maps them to a mesh.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from m2jax.dist.sharding import constrain
from m2jax.models import fused_attention, quantised

Stack = tuple[int, ...]
Init = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]

LAYER_NORM_EPS = 1e-5
LOOP_BYTES = 2**19  # of a sample's attention scores; with fewer, a loop over samples gains nothing


def param(rngs: nnx.Rngs, init: Init, shape: tuple[int, ...], axes: tuple[str | None, ...], dtype):
    """A parameter with its logical axes; a ``layers`` axis is named for each extra leading one."""
    axes = ("layers",) * (len(shape) - len(axes)) + axes
    return nnx.Param(init(rngs.params(), shape, dtype), logical_axes=axes)


def uniform(bound: float) -> Init:
    """Uniform on [-bound, bound)."""
    return lambda rng, shape, dtype: jax.random.uniform(rng, shape, dtype, -bound, bound)


def normal(std: float) -> Init:
    """Normal with mean 0."""
    return lambda rng, shape, dtype: std * jax.random.normal(rng, shape, dtype)


def constant(value: float) -> Init:
    """The same value everywhere."""
    return lambda _, shape, dtype: jnp.full(shape, value, dtype)


def at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
    """Precision of statistics, softmax and losses: float32, or the input's where that is higher."""
    return jnp.promote_types(dtype, jnp.float32)


@jax.named_scope("lookup")
def lookup(
    table: Float[Array, "vocab embed"], ids: Int[Array, "batch ..."], dtype: jnp.dtype
) -> Float[Array, "batch ... embed"]:
    """Rows of a table whose columns may lie on different devices, in the precision ``dtype``.

    Every device first finds its columns for the ids of all devices that share the table, then they
    exchange activations: each gets its own rows whole. The partitioner alone would gather the
    table, and in the backward pass make the gradient of the whole table on each device and sum it
    over all of them. So instead that gradient is only ever made for a device's own columns, and
    summed over the devices that hold the same ones.
    """
    inner = (None,) * (ids.ndim - 1)
    found = table[constrain(ids, ("rows", *inner))].astype(dtype)
    found = constrain(found, ("rows", *inner, "embed"))
    return constrain(found, ("batch", *inner, None))


class Linear(nnx.Module):
    """``x @ kernel + bias`` in the precision of ``x``; kernel [in, out]."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        shape: tuple[int, int],
        axes: tuple[str | None, str | None],
        *,
        init: Init,
        bias_init: Init | None = None,
        stack: Stack = (),
        dtype: jnp.dtype = jnp.float32,
        products: str = "",
    ):
        self.products = products  # how they are rounded: see models.quantised
        self.kernel = param(rngs, init, stack + shape, axes, dtype)
        self.bias = (
            param(rngs, bias_init, stack + shape[1:], axes[1:], dtype) if bias_init else None
        )

    @classmethod
    def scaled(
        cls,
        rngs: nnx.Rngs,
        shape: tuple[int, int],
        axes: tuple[str | None, str | None],
        gain: float,
        *,
        stack: Stack,
        dtype: jnp.dtype,
    ) -> Linear:
        """Starts at ``gain`` times what keeps the variance of its input, with a bias of 0."""
        init = normal(gain * shape[0] ** -0.5)
        return cls(rngs, shape, axes, init=init, bias_init=constant(0.0), stack=stack, dtype=dtype)

    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        """Applies the map to the last axis."""
        y = quantised.product(x, self.kernel[...].astype(x.dtype), self.products)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer norm over the last axis: biased variance, epsilon inside the root (spec section 1)."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        width: int,
        *,
        axis: str | None = None,
        eps: float = LAYER_NORM_EPS,
        stack: Stack = (),
        dtype: jnp.dtype = jnp.float32,
    ):
        self.eps = eps
        self.scale = param(rngs, constant(1.0), (*stack, width), (axis,), dtype)
        self.bias = param(rngs, constant(0.0), (*stack, width), (axis,), dtype)

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        """Standardises, scales and shifts."""
        y = standardise(x, self.eps)
        return y * self.scale[...].astype(y.dtype) + self.bias[...].astype(y.dtype)


@jax.named_scope("standardise")
def standardise(x: Float[Array, "... d"], eps: float) -> Float[Array, "... d"]:
    """(x - mean) / sqrt(variance + eps) over the last axis, computed in float32 or higher."""
    wide = x.astype(at_least_float32(x.dtype))
    centred = wide - wide.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + eps)).astype(x.dtype)


def normed(
    norm: LayerNorm, *linears: Linear, fused: bool = True
) -> Callable[[Float[Array, "... i"]], list[jax.Array]]:
    """Maps x to [linear(norm(x)) ...], the norm's scale and bias folded into the weights.

    ``(h * g + b) @ W + c`` is ``h @ (g[:, None] * W) + (b @ W + c)``: the same value, but two
    passes over the activations become one over the weights, forward and backward, and the weights
    are the smaller of the two in every batch worth training on. Of a few sentences or a single
    image the activations are the smaller: nothing is folded then. ``fused`` shares one product
    between all linears; apart, no result has to be cut, and each can be split over devices.
    """
    scale, shift = norm.scale[...], norm.bias[...]
    products = [_joined(part) for part in ([linears] if fused else [(one,) for one in linears])]
    outputs = sum(kernel.shape[1] for kernel, _, _ in products)

    def apply(x: jax.Array) -> list[jax.Array]:
        if math.prod(x.shape[:-1]) < outputs:
            y = norm(x)
            return [linear(y) for linear in linears]
        wide = jnp.promote_types(x.dtype, scale.dtype)  # half-precision weights lose no bit here
        g, b = scale.astype(wide), shift.astype(wide)
        folded = [(g[:, None] * kernel.astype(wide)).astype(x.dtype) for kernel, _, _ in products]
        h, results = standardise(x, norm.eps), []
        for weight, (kernel, bias, cuts) in zip(folded, products, strict=True):
            y = quantised.product(h, weight, linears[0].products)
            y = y + (b @ kernel.astype(wide) + bias.astype(wide)).astype(x.dtype)
            results += jnp.split(y, cuts, axis=-1)
        return results

    return apply


def _joined(linears: Sequence[Linear]) -> tuple[jax.Array, jax.Array, list[int]]:
    """Kernels and biases side by side, and where the product is cut again."""
    kernel = jnp.concatenate([linear.kernel[...] for linear in linears], axis=1)
    biases = [linear.bias for linear in linears if linear.bias is not None]
    assert len(biases) == len(linears)  # the fold needs a place for shift @ kernel
    sizes = [linear.kernel[...].shape[1] for linear in linears]
    cuts = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
    return kernel, jnp.concatenate([bias[...] for bias in biases]), cuts


def gelu(x: Float[Array, ...]) -> Float[Array, ...]:
    """The exact GELU, x Phi(x), by erf as torch does (``jax.nn.gelu`` takes the slower erfc)."""
    return 0.5 * x * (1.0 + jax.lax.erf(x * 0.5**0.5))


@jax.named_scope("attention")
def attention(
    q: Float[Array, "batch queries heads dim"],
    k: Float[Array, "batch keys heads dim"],
    v: Float[Array, "batch keys heads dim"],
    *,
    bias: Float[Array, "#batch 1 #queries keys"] | None = None,
) -> Float[Array, "batch queries heads dim"]:
    """Softmax attention with an additive bias; the scores are scaled by dim ** -0.5.

    The softmax runs in float32 (or higher) and its result is cast back to the inputs' precision,
    as the published code does (spec section 5, step 3).
    """
    scores = jnp.einsum("bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k)
    scores = scores.astype(at_least_float32(scores.dtype))
    if bias is not None:
        scores = scores + bias.astype(scores.dtype)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def attention_by_sample(
    q: Float[Array, "batch queries heads dim"],
    k: Float[Array, "batch keys heads dim"],
    v: Float[Array, "batch keys heads dim"],
    *,
    bias: Float[Array, "#batch 1 #queries keys"] | None = None,
) -> Float[Array, "batch queries heads dim"]:
    """``attention``, to the bit, one sample at a time where a sample has many scores.

    On a CPU the scores then stay in the cache, from the first product through the softmax to the
    second: 30 ms instead of 61 for 32 images (benchmarks/encode.md). On accelerators, and where the
    batch is spread over devices, a loop over it only costs time.
    """
    scores = q.shape[1] * k.shape[1] * q.shape[2] * at_least_float32(q.dtype).itemsize
    if q.shape[0] == 1 or scores < LOOP_BYTES:
        return attention(q, k, v, bias=bias)
    if bias is not None:
        bias = jnp.broadcast_to(bias, (q.shape[0], *bias.shape[1:]))

    def one(sample: tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]) -> jax.Array:
        q, k, v, bias = jax.tree.map(lambda part: part[None], sample)
        return attention(q, k, v, bias=bias)[0]

    return jax.lax.map(one, (q, k, v, bias))


# By what a config calls them.
ATTENTION = {
    "batch": attention,
    "sample": attention_by_sample,
    "xla": fused_attention.by_xla,
    "cudnn": fused_attention.by_cudnn,
}


def drop_path(
    x: Float[Array, "batch ..."], rate: Float[Array, ""] | float, rng: jax.Array
) -> Float[Array, "batch ..."]:
    """Zeroes a residual branch for a random share ``rate`` of the samples and rescales the rest.

    Source: Huang et al. 2016, "Deep networks with stochastic depth".
    """
    keep = 1.0 - rate
    kept = jax.random.bernoulli(rng, keep, (x.shape[0],) + (1,) * (x.ndim - 1))
    return jnp.where(kept, x / jnp.asarray(keep, x.dtype), jnp.zeros((), x.dtype))


def rematerialise(layer: Callable[..., jax.Array], policy: str) -> Callable[..., jax.Array]:
    """What the backward pass recomputes of a layer (``config.REMAT`` tells the policies)."""
    if policy == "none":
        return layer
    if policy == "offload":
        keep = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=list(KEPT["attention"]),
            offload_src="device",
            offload_dst="pinned_host",
        )
    elif policy in KEPT:
        keep = jax.checkpoint_policies.save_from_both_policies(
            jax.checkpoint_policies.save_only_these_names(*KEPT[policy]), fused_attention.is_forward
        )
    else:
        dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        keep = {"full": None, "dots": dots}[policy]
    return jax.checkpoint(layer, policy=keep)


# Results that layers name with ``checkpoint_name``, by the policy that keeps them.
KEPT = {"attention": ("qkv", "attention_out"), "products": ("qkv", "attention_out", "ffn_in")}
