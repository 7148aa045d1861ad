# SPDX-License-Identifier: Apache-2.0
"""Arithmetic of a traced step: the numerator of model-FLOPs utilisation."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any


class TraceError(Exception):
    """The trace does not tell how much is computed: no number is given."""


def traced(jaxpr: Any) -> float:
    """FLOPs of a traced function over all devices; recomputation in the backward pass included.

    Raises:
        TraceError: a product inside a loop whose number of iterations the trace does not tell.
    """
    total = 0.0
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += 2.0 * eqn.outvars[0].aval.size * math.prod(shape[i] for i in contracted)
            continue
        if name == "conv_general_dilated":
            kernel = eqn.invars[1].aval
            outputs = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
            total += 2.0 * eqn.outvars[0].aval.size * kernel.size / outputs
            continue
        inner = [traced(sub) for sub in _subjaxprs(params.values())]
        if name == "while" and any(inner):
            raise TraceError("a matrix product inside a while loop: its iterations are not traced")
        total += _repeats(name, params) * (max(inner, default=0) if name == "cond" else sum(inner))
    return total


def _repeats(name: str, params: Any) -> int:
    if name == "scan":
        return params["length"]
    if name == "shard_map":  # its shapes are those of one device
        return math.prod(params["mesh"].shape.values())
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    return 1


def _subjaxprs(values: Iterable[Any]) -> list[Any]:
    found = []
    for value in values:
        if hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns"):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += _subjaxprs(value)
    return found
