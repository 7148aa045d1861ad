# SPDX-License-Identifier: Apache-2.0
"""The check of an imported CLIP, SigLIP or Chinese-CLIP: the file's own features against ours."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int

from m2jax.checkpoint.convert import check
from m2jax.checkpoint.convert.dual_reference import Reference
from m2jax.config_dual import Dual
from m2jax.data.text import Tokenizer
from m2jax.models import params as params_lib
from m2jax.models.params import Params


class Probes(NamedTuple):
    """What is encoded on both sides."""

    pixels: Float[np.ndarray, "pictures side side 3"]
    ids: Int[np.ndarray, "texts length"]
    mask: Bool[np.ndarray, "texts length"]


def probes(cfg: Dual, tokenizer: Tokenizer | None) -> Probes:
    """Two generated pictures, random ids of several lengths, and a few texts."""
    made = check.pictures(cfg.vision.image_size)
    tokens = check.texts(cfg.text.vocab_size, min(cfg.text.positions, 77), tokenizer)
    return Probes(np.stack([made["gradient"], made["noise"]]), *tokens)


def run(
    tensors: Mapping[str, np.ndarray],
    cfg: Dual,
    layout: str,
    params: Params,
    tokenizer: Tokenizer | None,
) -> list[check.Row]:
    """Encodes the probes with both.

    Where parameters were rounded to a narrower type, the reference rounds the file's numbers alike.

    Args:
        tensors: of the source file, by its names.
        cfg: the config.
        layout: of the file.
        params: what was made of the tensors.
        tokenizer: adds texts to the probes.

    Raises:
        UserError: a tensor that features need is missing.
    """
    given = probes(cfg, tokenizer)
    dtype = np.dtype(cfg.param_dtype)

    def rounded(array: np.ndarray) -> np.ndarray:
        return array.astype(dtype).astype(np.float64)

    model = Reference(lambda name: rounded(tensors[name]), cfg, layout)
    with check.every_tensor_there():
        before = {
            "image": model.image(given.pixels),
            "text": model.text(lambda name, i: rounded(tensors[name][i]), given.ids, given.mask),
            "scales": np.insert(model.scales(), 0, 1.0, axis=1),  # a cosine needs a length
        }
    graph = params_lib.abstract(cfg).graph
    with jax.default_matmul_precision("highest"):
        after = _forward(graph, params, *map(jnp.asarray, given))
    return check.compare(before, jax.tree.map(np.asarray, after))


@functools.partial(jax.jit, static_argnums=0)
def _forward(
    graph: nnx.GraphDef, params: Params, pixels: jax.Array, ids: jax.Array, mask: jax.Array
) -> dict[str, jax.Array]:
    model = params_lib.bind(graph, params)
    names = [name for name in ("logit_scale", "logit_bias") if name in params]
    scales = [jnp.ones(()), *(params[name].astype(jnp.float32) for name in names)]
    return {
        "image": model.encode_image(pixels).features,
        "text": model.encode_text(ids, mask).features,
        "scales": jnp.stack(scales)[None],
    }
