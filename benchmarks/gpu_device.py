# SPDX-License-Identifier: Apache-2.0
"""JAX on the card under test: its facts, its measured ceilings, programs compiled side by side."""

import concurrent.futures
import time

import jax
import jax.numpy as jnp
import numpy as np
from gpu_clock import Rows, measure, spare_compile_threads

SIDE, COPIED = 8192, 2**32  # of the products; bytes of the copied array
SMOKE_SIDE, SMOKE_COPIED = 256, 2**20
KINDS = {"bfloat16": jnp.bfloat16, "float8": jnp.float8_e4m3fn, "int8": jnp.int8, "tf32": "tf32"}


def memory_limit() -> float:
    """Bytes a program may use here; of a CPU, what a small card has."""
    stats = jax.devices()[0].memory_stats() or {}
    return float(stats.get("bytes_limit", 16e9))


def wait(result) -> None:
    """Returns when every array of it is there."""
    jax.block_until_ready(result)


def compiled_together(lowered: list) -> list:
    """Compiles programs side by side: [(program or the error, seconds)], in order.

    They are traced before, one after the other: only the compiler works outside Python's lock.
    """

    def one(program):
        start = time.perf_counter()
        try:
            done = program.compile() if hasattr(program, "compile") else program
        except Exception as error:
            done = error
        return done, time.perf_counter() - start

    with concurrent.futures.ThreadPoolExecutor(spare_compile_threads()) as pool:
        return list(pool.map(one, lowered))


def traced(function, *args):
    """A lowered program, or the error that its tracing raised."""
    try:
        return function.lower(*args)
    except Exception as error:
        return error


def space(compiled) -> dict:
    """Bytes of a compiled program: temporaries, and all it holds at once."""
    found = compiled.memory_analysis()
    if found is None:
        return {}
    arguments = found.argument_size_in_bytes
    results = found.output_size_in_bytes - found.alias_size_in_bytes
    temporaries = found.temp_size_in_bytes
    return {"temporaries": temporaries, "bytes": arguments + results + temporaries}


def ceilings(cases: list[dict], rows: Rows, smoke: bool) -> None:
    """The rates that everything else is held against: products of random matrices, a copy.

    Random numbers, because products of zeros run faster than those of real data.
    """
    for case in cases:
        work = _copy if case["what"] == "copy" else _product
        rows.attempt(case, lambda case=case, work=work: work(case["what"], smoke))


def _product(kind: str, smoke: bool) -> dict:
    side = SMOKE_SIDE if smoke else SIDE
    rng = np.random.default_rng(0)
    dtype = jnp.float32 if kind == "tf32" else KINDS[kind]
    wide = jnp.int32 if kind == "int8" else jnp.float32 if kind == "float8" else dtype
    made = 20 * rng.standard_normal((2, side, side), np.float32) if kind == "int8" else None
    made = rng.standard_normal((2, side, side), np.float32) if made is None else made
    a, b = (jnp.asarray(x).astype(dtype) for x in made)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=wide))
    wait(product(a, b))
    found = measure(lambda: product(a, b), wait, 1.0)
    return {**found, "side": side, "flops_per_s": 2 * side**3 / found["seconds"]}


def _copy(_: str, smoke: bool) -> dict:
    size = SMOKE_COPIED if smoke else COPIED
    x = jax.random.normal(jax.random.key(0), (size // 2,), jnp.bfloat16)
    copied = jax.jit(lambda x: -x)  # as many bytes as a copy, and never left out as one can be
    wait(copied(x))
    found = measure(lambda: copied(x), wait, 1.0)
    return {**found, "bytes_per_s": 2 * size / found["seconds"]}
