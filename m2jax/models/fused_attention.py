# SPDX-License-Identifier: Apache-2.0
"""``jax.nn.dot_product_attention`` as a form of attention: XLA's own, or cuDNN's fused kernel.

Both keep scores in float32 where ``layers.attention`` rounds them once to the inputs' precision, so
in half precision the numbers differ by that rounding. What an encoder does around cuDNN's kernel,
so that nothing is copied for its sake, is here too; what each step is worth by the plan is in
benchmarks/gpu_compiled.md.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from m2jax.config import UserError

# What stands for -inf in cuDNN's additive masks: jax's own choice, as differences of two larger
# numbers are wrong there. exp() of it is 0 all the same. float16 has nothing below -65,504.
LOWEST = {"bfloat16": -(2.0**41), "float16": -(2.0**15)}


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
    length: int | None = None,
) -> Float[Array, "batch queries heads dim"]:
    """``layers.attention`` in one kernel of cuDNN's, whose scores never reach the GPU's memory.

    Its backward pass takes even lengths alone (jax refuses others, with a bias or without), so an
    odd one, as of 196 patches and [CLS], is filled up with a token that nobody sees. That copies
    queries, keys and values: an encoder fills up its tokens before the first layer (``filled``).

    Args:
        q: queries.
        k: keys.
        v: values.
        bias: added to the scores.
        length: leading keys that are tokens, where those after them only fill up; all if not given.

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
    lengths, length = None, keys if length is None else length
    if bias is not None:
        real, lowest = jnp.arange(keys) < length, LOWEST[q.dtype.name]
        finite = jnp.where(real, jnp.maximum(bias, lowest), lowest).astype(q.dtype)
        bias = jnp.broadcast_to(finite, (*bias.shape[:2], queries, keys))
        bias = _even(_even(bias, 2), 3, lowest)
    elif length < k.shape[1]:
        lengths = jnp.full(len(q), length, jnp.int32)
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
    found = found[:, :queries]
    # Heads side by side are one axis to all that follows. Told so, XLA makes one kernel of a norm
    # over them; left to see two axes, it makes three.
    flat = jax.lax.optimization_barrier(found.reshape(*found.shape[:2], -1))
    return flat.reshape(found.shape)


def filled(
    tokens: Float[Array, "batch length width"],
    token_mask: Float[Array, "batch length"] | None,
    blocked: Float[Array, "#batch length length"] | None,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Tokens of an even length, with their masks: a last one of zeros is added to an odd length.

    One token more costs half a per cent of an image's products; copying queries, keys and values
    into an even length in every layer, twice, costs six times that.
    """
    tokens = _even(tokens, 1)
    token_mask = token_mask if token_mask is None else _even(token_mask, 1)
    blocked = blocked if blocked is None else _even(_even(blocked, 1), 2)
    return tokens, token_mask, blocked


def row_major(tokens: Float[Array, "batch length width"]) -> Float[Array, "batch length width"]:
    """The same tokens, which lie in memory as a table with a row for each.

    Where a stack of layers is written out XLA may choose to lay samples side by side instead, and
    every norm then falls apart into several kernels. (jax's ``with_layout_constraint`` says it more
    plainly, but is not partitioned: on a mesh the tokens would be gathered in every layer.)
    """
    table = jax.lax.optimization_barrier(tokens.reshape(-1, tokens.shape[-1]))
    return table.reshape(tokens.shape)


def is_forward(primitive: Any, *_: Any, **__: Any) -> bool:
    """A policy of ``jax.checkpoint``: keep what cuDNN's forward kernel made.

    Its output and a sum per query are small; without them the backward pass runs it a second time.
    """
    return primitive.name.startswith("dot_product_attention_fwd")


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
