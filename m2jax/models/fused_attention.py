# SPDX-License-Identifier: Apache-2.0
"""``jax.nn.dot_product_attention`` as a form of attention: XLA's own, or cuDNN's fused kernel.

Which is fast on a GPU is for benchmarks/gpu.py to tell; until then neither is a default. Both keep
scores in float32 where ``layers.attention`` rounds them once to the inputs' precision, so in half
precision the numbers differ by that rounding.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from m2jax.config import UserError

# What stands for -inf in cuDNN's additive masks: jax's own choice, as differences of two larger
# numbers are wrong there. exp() of it is 0 all the same.
LOWEST = -(2.0**41)


@jax.named_scope("attention")
def by_xla(
    q: Float[Array, "batch queries heads dim"],
    k: Float[Array, "batch keys heads dim"],
    v: Float[Array, "batch keys heads dim"],
    *,
    bias: Float[Array, "#batch 1 #queries keys"] | None = None,
) -> Float[Array, "batch queries heads dim"]:
    """``layers.attention`` by jax's own formula; its softmax runs in float32, never wider."""
    return jax.nn.dot_product_attention(q, k, v, bias, implementation="xla")


@jax.named_scope("attention")
def by_cudnn(
    q: Float[Array, "batch queries heads dim"],
    k: Float[Array, "batch keys heads dim"],
    v: Float[Array, "batch keys heads dim"],
    *,
    bias: Float[Array, "#batch 1 #queries keys"] | None = None,
) -> Float[Array, "batch queries heads dim"]:
    """``layers.attention`` in one kernel of cuDNN's, whose scores never reach the GPU's memory.

    Its backward pass takes even lengths alone (jax refuses others, with a bias or without), so an
    odd one, as of 196 patches and [CLS], is filled up with a token that nobody sees.

    Raises:
        UserError: no cuDNN here, inputs of another precision than bfloat16 or float16, or heads
            that are wider than 128 or no multiple of 8.
    """
    if q.dtype not in (jnp.bfloat16, jnp.float16) or q.shape[-1] > 128 or q.shape[-1] % 8:
        raise UserError(
            f"model.attention=cudnn: {q.dtype.name} heads of {q.shape[-1]}: it takes bfloat16 or "
            "float16 and heads of at most 128, a multiple of 8: use batch"
        )
    queries, keys = q.shape[1], k.shape[1]
    q, k, v = (_even(x, 1) for x in (q, k, v))
    lengths = None
    if bias is not None:
        finite = jnp.maximum(bias, LOWEST).astype(q.dtype)
        bias = jnp.broadcast_to(finite, (*bias.shape[:2], queries, keys))
        bias = _even(_even(bias, 2), 3, LOWEST)
    elif keys % 2:
        lengths = jnp.full(len(q), keys, jnp.int32)
    try:
        found = jax.nn.dot_product_attention(
            q, k, v, bias, key_value_seq_lengths=lengths, implementation="cudnn"
        )
    except (RuntimeError, NotImplementedError, ValueError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(
            f"model.attention=cudnn: cuDNN does not take {q.dtype.name}{list(q.shape)} here "
            f"({reason}): use batch"
        ) from error
    return found[:, :queries]


def _even(x: jax.Array, axis: int, value: float = 0.0) -> jax.Array:
    """An axis made one longer where it is odd."""
    widths = [(0, x.shape[i] % 2 if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value)


def check(attention: str, mesh: Mesh) -> None:
    """Refuses a form of attention that the devices of a run cannot compute.

    Raises:
        UserError: cuDNN on devices that are no GPUs.
    """
    platform = mesh.devices.flat[0].platform
    if attention == "cudnn" and platform not in ("gpu", "cuda"):
        raise UserError(
            f"model.attention=cudnn: needs NVIDIA GPUs, and this run has {platform} devices: "
            "use batch"
        )
