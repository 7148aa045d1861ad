# SPDX-License-Identifier: Apache-2.0
"""The contrastive loss alone on one card: value and gradients, from 32,768 to a million pairs.

The roofline counts three products of pairs x pairs x dim: the logits, and one for each side's
gradient. The block-wise forms make the logits a second time instead of keeping them, so 4 of 3 is
the best they could do; ``dense`` keeps them.

Called as a script it measures nothing: it compiles the cases ahead of time for an H200, which need
not be there, and prints what each program would hold and move.

    JAX_PLATFORMS=cpu JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 python benchmarks/gpu_loss.py --pairs 262144
"""

import argparse
import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from gpu_clock import Rows, measure
from gpu_device import compiled_together, memory_limit, space, traced, wait
from gpu_parts import PARTS

from m2jax import config
from m2jax.dist.mesh import make_mesh
from m2jax.dist.sharding import batch_sharding, replicated
from m2jax.dist.topology import describe, uncached
from m2jax.losses import fused
from m2jax.losses.contrastive import contrastive_loss
from m2jax.plan import hlo, loops, traffic

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


def ahead(case: dict, topology: str) -> dict:
    """What the program of a case would hold and move on a card that is not there.

    Bytes are the compiled text's: each array once per instruction and run, from memory, whatever a
    cache would have held.
    """
    mesh = make_mesh(config.Mesh(), list(describe(topology).devices))
    rows, whole = batch_sharding(mesh), replicated(mesh)
    shape = jax.ShapeDtypeStruct((case["pairs"], DIM), jnp.float32, sharding=rows)
    scale = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    program = program_of(case, case.get("tile", 1024), mesh=mesh)
    with uncached(), blocks_of(case):
        compiled = program.lower(shape, shape, scale).compile()
    module = hlo.parse(compiled.as_text() or "")
    moved = [
        visit.times * traffic.moved(module, visit.computation, visit.instruction)
        for visit in loops.walk(module)
        if not visit.inside
    ]
    return {**space(compiled), "moved": sum(moved)}


def main() -> None:
    """Prints a row per block-wise case of the parts of gpu.py."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=262_144)
    parser.add_argument("--topology", default="h200:1x1")
    args = parser.parse_args()
    cases = [case for part in PARTS if part.work == "gpu_loss:losses" for case in part.cases]
    print("| case | temporaries MB | moved GB |\n|---|---|---|")
    for case in cases:
        if case["pairs"] != args.pairs or case["impl"] == "dense":
            continue
        found = ahead(case, args.topology)
        words = " ".join(f"{key}={value}" for key, value in case.items() if key != "pairs")
        print(f"| {words} | {found['temporaries'] / 1e6:.0f} | {found['moved'] / 1e9:.0f} |")


if __name__ == "__main__":
    main()
