# SPDX-License-Identifier: Apache-2.0
"""Encoding on one card: images and texts a second, in bfloat16 and in 8 bits, and what 8 bits cost.

The accuracy loss is one minus the cosine between the features and those of the same weights in
float32 products, mean and worst over random inputs. Weights are random: a trained model's are to be
judged by ``m2jax eval``.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from gpu_clock import Rows, measure, rows_for
from gpu_device import compiled_together, memory_limit, space, traced, wait
from gpu_step import TINY_ROWS, model_of

from m2jax.models import params as params_lib
from m2jax.train import flops

CHECKED = 16  # rows whose features are compared
SECONDS = 1.0


def inputs_of(cfg, modality: str, rows: int) -> tuple:
    """Random pixels, or ids and their mask."""
    rng = np.random.default_rng(1)
    if modality == "image":
        pixels = rng.random((rows, cfg.image_size, cfg.image_size, 3), np.float32)
        return (jnp.asarray(pixels, jnp.bfloat16),)
    ids = rng.integers(0, min(250, cfg.vocab_size), (rows, cfg.max_text_len))
    lengths = rng.integers(min(8, cfg.max_text_len), cfg.max_text_len + 1, (rows, 1))
    return jnp.asarray(ids, jnp.int32), jnp.asarray(np.arange(cfg.max_text_len) < lengths)


def encoder(cfg, modality: str):
    """(parameters, inputs) -> features [rows, dim]."""
    graph = params_lib.abstract(cfg).graph

    def encode(params, *inputs):
        model = params_lib.bind(graph, params)
        return getattr(model, f"encode_{modality}")(*inputs).features

    return jax.jit(encode)


def encodings(cases: list[dict], rows: Rows, smoke: bool) -> None:
    """Every case of one model: the parameters are made once, in bfloat16."""
    memory = memory_limit()
    cases = [{"attention": "batch", "products": "", "param_dtype": "bfloat16", **c} for c in cases]
    first = model_of({**cases[0], "products": "", "attention": "batch"}, smoke)
    params = jax.jit(params_lib.initialise, static_argnums=0)(first, jax.random.key(0))
    work = [_prepared(case, smoke, memory, params) for case in cases]
    programs = compiled_together([lowered for _, _, _, lowered in work])
    exact: dict[str, jax.Array] = {}
    for (case, cfg, inputs, _), (program, seconds) in zip(work, programs, strict=True):

        def one(case=case, cfg=cfg, inputs=inputs, program=program, seconds=seconds):
            if isinstance(program, Exception):
                raise program
            modality, features = case["modality"], program(params, *inputs)
            found = measure(lambda: program(params, *inputs), wait, 0.1 if smoke else SECONDS)
            if modality not in exact:
                exact[modality] = _exact(first, params, modality, inputs)
            return {
                "rows": len(inputs[0]),
                **space(program),
                **found,
                **off(features[:CHECKED], exact[modality]),
                "model_flops": _flops(cfg, modality, params, inputs),
                "compile_seconds": seconds,
            }

        rows.attempt(case, one)


def _prepared(case: dict, smoke: bool, memory: float, params) -> tuple:
    cfg = model_of(case, smoke)
    inputs = inputs_of(cfg, case["modality"], TINY_ROWS if smoke else rows_for(case, memory))
    return case, cfg, inputs, traced(encoder(cfg, case["modality"]), params, *inputs)


def _exact(cfg, params, modality: str, inputs: tuple) -> jax.Array:
    """Features of the first rows in float32 products, on the same (rounded) weights."""
    few = tuple(x[:CHECKED].astype(jnp.float32) if modality == "image" else x[:CHECKED]
                for x in inputs)  # fmt: skip
    wide = dataclasses.replace(cfg, dtype="float32")
    with jax.default_matmul_precision("highest"):
        return encoder(wide, modality)(params, *few)


def _flops(cfg, modality: str, params, inputs: tuple) -> float:
    """By the library's counter, in the form whose products it sees."""
    plain = dataclasses.replace(cfg, attention="batch", products="")
    return flops.traced(encoder(plain, modality).trace(params, *inputs).jaxpr)


def off(features: jax.Array, exact: jax.Array) -> dict:
    """1 - cosine of rows: mean and most."""
    a, b = (np.asarray(x, np.float64) for x in (features, exact))
    gaps = 1 - (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return {"mean_off": float(gaps.mean()), "most_off": float(gaps.max())}
