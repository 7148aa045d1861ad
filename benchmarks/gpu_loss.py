# SPDX-License-Identifier: Apache-2.0
"""The contrastive loss alone on one card: value and gradients, from 32,768 to a million pairs.

The roofline counts three products of pairs x pairs x dim: the logits, and one for each side's
gradient. The block-wise forms make the logits a second time instead of keeping them, so 4 of 3 is
the best they could do; ``dense`` keeps them.
"""

import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from gpu_clock import Rows, measure
from gpu_device import compiled_together, memory_limit, space, traced, wait

from m2jax.losses import fused
from m2jax.losses.contrastive import contrastive_loss

DIM, TINY_PAIRS, TINY_DIM, TINY_TILE = 1024, 256, 64, 64
PRODUCTS = 3  # of pairs x pairs x dim, that any form has to do


def pairs_of(pairs: int, dim: int) -> tuple[jax.Array, jax.Array]:
    """Unit rows whose partners are near, as of a model that has learned a little."""
    image, noise = jax.random.normal(jax.random.key(0), (2, pairs, dim))
    text = image + 2.0 * noise
    return tuple(x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in (image, text))


def program_of(case: dict, tile: int, smoke: bool = False, mesh=None):
    """(image, text, scale) -> value and gradients. Smoke runs take Pallas's interpreter."""
    kernel = case.get("kernel", "xla")
    kernel = fused.INTERPRET if smoke and kernel == "pallas" else kernel
    options = {"wire_dtype": case.get("wire", ""), "tile": tile, "kernel": kernel, "mesh": mesh}

    def loss(image, text, scale):
        return contrastive_loss(image, text, scale, impl=case["impl"], **options)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))


def losses(cases: list[dict], rows: Rows, smoke: bool) -> None:
    """Compiles every case, then times each, in order."""
    memory = memory_limit()
    ready = [_prepared(case, smoke) for case in cases]
    programs = compiled_together([lowered for _, _, lowered in ready])
    for (case, pairs, _), (program, seconds) in zip(ready, programs, strict=True):
        rows.attempt(case, lambda p=pairs, run=program, s=seconds: _timed(p, run, s, memory, smoke))


@contextlib.contextmanager
def blocks_of(case: dict) -> Iterator[None]:
    """The kernels of ``case["blocks"]`` (rows, columns, depth, warps, stages), for 16-bit types."""
    kept = dict(fused.BLOCKS)
    if "blocks" in case:
        fused.BLOCKS[2] = fused.Blocks(*case["blocks"])
    try:
        yield
    finally:
        fused.BLOCKS.update(kept)


def _prepared(case: dict, smoke: bool) -> tuple:
    pairs, dim = (TINY_PAIRS, TINY_DIM) if smoke else (case["pairs"], DIM)
    shape = jax.ShapeDtypeStruct((pairs, dim), jnp.float32)
    scale = jax.ShapeDtypeStruct((), jnp.float32)
    tile = TINY_TILE if smoke else case.get("tile", 1024)
    with blocks_of(case):
        lowered = traced(program_of(case, tile, smoke), shape, shape, scale)
    return case, (pairs, dim), lowered


def _timed(size: tuple[int, int], program, compile_seconds: float, memory: float, smoke: bool):
    """The row of one case."""
    if isinstance(program, Exception):
        raise program
    needs = space(program)
    if needs.get("bytes", 0) > memory:
        raise MemoryError(f"does not fit: {needs['bytes'] / 1e9:.0f} GB of {memory / 1e9:.0f}")
    image, text = jax.jit(pairs_of, static_argnums=(0, 1))(*size)
    scale = jnp.float32(14.3)
    value, _ = program(image, text, scale)
    found = measure(lambda: program(image, text, scale), wait, 0.2 if smoke else 2.0)
    return {
        "rows": size[0],
        **needs,
        **found,
        "loss": float(value),
        "model_flops": PRODUCTS * 2.0 * size[0] ** 2 * size[1],
        "compile_seconds": compile_seconds,
    }
