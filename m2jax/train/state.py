# SPDX-License-Identifier: Apache-2.0
"""Everything about a run that the step changes: one pytree of arrays, saved and restored whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from m2jax.models.params import Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TrainState:
    """The state after ``step`` steps."""

    step: jax.Array  # int32 []; batches consumed, skipped ones included
    params: Params
    opt_state: Any
    ema: Params | None  # running average of params, float32 or wider; None unless optim.ema
    rng: jax.Array  # uint32 [2], key data of the run; each step folds its number in
    norm_mean: jax.Array  # float32 []; running mean of accepted gradient norms, for the guard
    skipped: jax.Array  # int32 []; steps skipped in a row


def wide(leaf: jax.Array) -> jax.Array:
    """A copy in float32 or wider: a running average in bfloat16 would stand still."""
    return jnp.array(leaf, jnp.promote_types(leaf.dtype, jnp.float32))


def fresh(params: Params, opt_state: Any, seed: int, *, ema: bool) -> TrainState:
    """The state before the first step."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=opt_state,
        ema=jax.tree.map(wide, params) if ema else None,
        rng=jax.random.key_data(jax.random.key(seed)),
        norm_mean=jnp.zeros((), jnp.float32),
        skipped=jnp.zeros((), jnp.int32),
    )
