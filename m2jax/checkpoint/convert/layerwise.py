# SPDX-License-Identifier: Apache-2.0
"""An M2-Encoder run one layer at a time: what the check of an import compares.

The compiled model scans over stacks of layers. XLA on the CPU has no slices of bfloat16 and holds
such stacks widened to float32, all of them at once: 12 times a file's largest tensor at 1B
(benchmarks/convert.md). Here one layer is widened, run, and let go.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from m2jax.models import params as params_lib
from m2jax.models.m2 import M2Encoder
from m2jax.models.multiway import Encoded, Encoder
from m2jax.models.params import Params


class Layerwise(nnx.Module):
    """Takes an ``Encoder``'s place and is called like it; computes in float32."""

    def __init__(self, encoder: Encoder) -> None:
        cfg = dataclasses.replace(encoder.cfg, dtype="float32", param_dtype="float32")
        self.encoder = encoder
        self.single = nnx.graphdef(nnx.eval_shape(lambda: Encoder(nnx.Rngs(0), cfg, 1)))

    def __call__(
        self,
        tokens: Float[Array, "batch length width"],
        *,
        split: int,
        token_mask: Float[Array, "batch length"] | None = None,
        rng: None = None,
        capture: bool = False,
    ) -> Encoded:
        """The last layer's output, normed; of no layer does anything else stay."""
        state = nnx.to_pure_dict(nnx.state(self.encoder))
        normed = tokens
        for layer in range(self.encoder.depth):
            weights = state | {"blocks": _widened(state["blocks"], layer)}
            normed, tokens = _run(self.single, split, weights, tokens, token_mask)
        return Encoded(normed, None)


def bind(graph: nnx.GraphDef, params: Params) -> M2Encoder:
    """The model of these parameters, to be called outside ``jax.jit``."""
    model = params_lib.bind(graph, params)
    model.backbone, model.vl = Layerwise(model.backbone), Layerwise(model.vl)
    return model


@jax.jit
def _widened(blocks: Params, layer: jax.Array) -> Params:
    """One layer of a stack, as a stack of one."""
    return jax.tree.map(
        lambda whole: jax.lax.dynamic_slice_in_dim(whole, layer, 1).astype(jnp.float32), blocks
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(
    graph: nnx.GraphDef, split: int, params: Params, tokens: jax.Array, mask: Any
) -> tuple[jax.Array, jax.Array]:
    """The layer's output: normed as if it were the last, and as the next layer takes it."""
    encoded = nnx.merge(graph, params)(tokens, split=split, token_mask=mask, capture=True)
    assert encoded.layers is not None  # captured
    return encoded.tokens, encoded.layers[0]
