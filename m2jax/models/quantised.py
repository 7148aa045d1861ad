# SPDX-License-Identifier: Apache-2.0
"""Products of activations and weights in 8 bits (``model.products``), through AQT (extra ``aqt``).

Every row of activations and every column of weights is scaled by its own largest absolute value,
rounded to int8 or float8 (e4m3) and multiplied there; sums are 32 bits wide. Gradients are those of
the unrounded product, in the activations' own precision, so nothing is rounded twice and no state
is kept. Chips without such units run it too, slower than without.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float

from m2jax.config import UserError


def product(
    x: Float[Array, "... i"], kernel: Float[Array, "i o"], kind: str
) -> Float[Array, "... o"]:
    """``x @ kernel`` in the precision of ``x``, or rounded as ``kind`` (int8 | fp8) says.

    Raises:
        UserError: AQT is not installed.
    """
    if not kind:
        return x @ kernel
    rounded = _dot_general(kind)(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))
    return rounded.astype(x.dtype)


def _dot_general(kind: str) -> Any:
    """AQT's stand-in for ``jax.lax.dot_general``: the forward product alone is rounded."""
    try:
        from aqt.jax.v2 import config as aqt
    except ImportError as error:
        raise UserError(
            f"model.products={kind}: needs the package aqtp: pip install aqtp"
        ) from error
    if kind == "fp8":
        return aqt.config_fwd_fp8("e4m3")
    made = aqt.config_v4(fwd_bits=8, dlhs_bits=None, drhs_bits=None)
    aqt.set_stochastic_rounding(made, False, False, "jax.uniform")  # no gradient is rounded
    return made
