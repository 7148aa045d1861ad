# SPDX-License-Identifier: Apache-2.0
"""The reduction of most public code: every device gathers all features and scores its own rows.

Open_clip's ``local_loss`` with ``gather_with_grad``: two blocks of [rows, batch] logits on each
device, one per direction. Differentiated by JAX; the gather's transpose adds the gradients up.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from m2jax.losses.layout import gather
from m2jax.losses.ring import Pairs, on_devices
from m2jax.losses.tiles import SIGMOID, Sums


def gathered_sums(
    pairs: Pairs,
    image: Float[Array, "batch dim"],
    text: Float[Array, "batch dim"],
    ids: Int[Array, " batch"],
    scale: Float[Array, ""],
    bias: Float[Array, ""],
) -> tuple[Any, Any]:
    """The same as ``ring.pair_sums``."""
    rows, whole = pairs.layout.row_spec, PartitionSpec()
    body = functools.partial(_body, pairs)
    return on_devices(pairs, body, (rows, rows, rows, whole, whole), (rows, rows))(
        image, text, ids, scale, bias
    )


def _body(
    pairs: Pairs,
    image: jax.Array,
    text: jax.Array,
    ids: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
) -> tuple[Any, Any]:
    axes = pairs.layout.rows if pairs.layout.mesh else ()
    image, text = image.astype(pairs.wire), text.astype(pairs.wire)
    all_ids = gather(ids, axes)

    def sums(ours: jax.Array, theirs: jax.Array) -> Any:
        product = jnp.matmul(ours, theirs.T, preferred_element_type=scale.dtype)
        keep = ids[:, None] != all_ids[None, :]
        logits = jnp.where(keep, scale * product + bias, -jnp.inf)
        if pairs.form is SIGMOID:
            return jax.nn.softplus(logits).sum(1)
        top = lax.stop_gradient(logits.max(1))
        return Sums(top, jnp.exp(logits - jnp.where(top == -jnp.inf, 0, top)[:, None]).sum(1))

    by_row = sums(image, gather(text, axes))
    # A sigmoid sees every pair once: the columns would count them again.
    both = pairs.form is not SIGMOID
    return by_row, sums(text, gather(image, axes)) if both else jnp.zeros_like(by_row)
