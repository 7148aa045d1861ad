# SPDX-License-Identifier: Apache-2.0
"""What benchmarks/gpu.py measures, most important first. Rows of a batch are those of an H200."""

from typing import NamedTuple

# What the configs for GPUs set: the least bytes moved of all programs compiled (gpu.md).
FAST = {"attention": "cudnn", "unroll": 24, "fused_qkv": False}
SHIPPED = {"size": "1b", "batch": 256, "remat": "none", **FAST}
NO_COMMAND_BUFFERS = "--xla_gpu_enable_command_buffer="


class Part(NamedTuple):
    """Cases that run in one child process.

    ``work`` is MODULE:FUNCTION, called with (cases, rows, smoke).
    """

    name: str
    work: str
    seconds: float  # it may take, start and compiling included
    cases: tuple[dict, ...]
    flags: str = ""  # of XLA, for this process
    needs: tuple[str, ...] = ("jax",)  # packages, without which it is left out


def training(size: str, *variants: dict, **common) -> tuple[dict, ...]:
    """Cases of one size."""
    return tuple({"size": size, **common, **variant} for variant in variants)


def encoding(size: str, rows: dict[str, int], *variants: dict) -> tuple[dict, ...]:
    """Both modalities of one size, in each variant."""
    return tuple(
        {"size": size, "modality": modality, "batch": batch, **variant}
        for variant in variants
        for modality, batch in rows.items()
    )


SIZES = ("size", "batch", "pairs", "tile")  # of a case: they change no path
ENCODE_FAST = {"attention": "cudnn", "fused_qkv": False}
EIGHT_BITS = ({}, {"products": "int8"}, {"products": "fp8"})
STEP, PEER, HUGGING_FACE = "gpu_step:steps", "gpu_torch:peers", "gpu_hf:peers"
LOSS, CHUNKED = "gpu_loss:losses", {"impl": "chunked", "wire": "bfloat16"}
# Blocks of the loss's kernels of which a multiprocessor has room for two: one's exponentials may
# run beside the other's products, but more bytes of features are read for each product.
TWO_AT_A_TIME = (128, 128, 64, 4, 3)
TORCH = ("torch",)

PARTS = (
    Part("ceilings", "gpu_device:ceilings", 40, tuple(
        {"what": what} for what in ("bfloat16", "copy", "float8", "int8", "tf32")
    )),
    Part("train 1b", STEP, 175, training(  # a program of written-out layers compiles for minutes
        "1b",
        {"batch": 256, "remat": "none", **FAST},
        {"batch": 512, "remat": "none", **FAST},
        {"batch": 512, "remat": "products", "attention": "cudnn", "fused_qkv": False},
        {"batch": 512, "remat": "products", "attention": "batch"},
    )),
    Part("torch train 1b", PEER, 90, training(
        "1b",
        {"batch": 256, "stream": "bfloat16"}, {"batch": 256},
        {"batch": 128, "stream": "bfloat16"},
        kind="train",
    ), needs=TORCH),
    Part("loss", LOSS, 90, (
        {"pairs": 262_144, **CHUNKED, "tile": 4096},
        {"pairs": 262_144, **CHUNKED, "tile": 4096, "kernel": "pallas"},
        {"pairs": 262_144, **CHUNKED, "tile": 2048, "kernel": "pallas"},
        {"pairs": 262_144, **CHUNKED, "tile": 2048},
        {"pairs": 32_768, **CHUNKED, "tile": 4096, "kernel": "pallas"},
        {"pairs": 32_768, **CHUNKED, "tile": 4096},
        {"pairs": 32_768, "impl": "dense"},
        {"pairs": 262_144, **CHUNKED, "tile": 4096, "kernel": "pallas", "blocks": TWO_AT_A_TIME},
        {"pairs": 262_144, **CHUNKED, "tile": 1024, "kernel": "pallas"},
        {"pairs": 262_144, **CHUNKED, "tile": 1024},
        {"pairs": 131_072, **CHUNKED, "tile": 4096},
        {"pairs": 262_144, "impl": "chunked", "tile": 4096},
    )),
    Part("kernels 1b", "gpu_trace:traces", 60, (SHIPPED,), NO_COMMAND_BUFFERS),
    Part("encode 1b", "gpu_encode:encodings", 60,
         encoding("1b", {"image": 512, "text": 2048}, *EIGHT_BITS, ENCODE_FAST)),
    Part("loss 1m", LOSS, 90, (
        {"pairs": 1_048_576, **CHUNKED, "tile": 4096, "kernel": "pallas"},
        {"pairs": 1_048_576, **CHUNKED, "tile": 4096},
    )),
    Part("train 10b-slice", STEP, 90, training(
        "10b-slice",
        {"batch": 128, "remat": "attention", "attention": "cudnn", "fused_qkv": False},
        {"batch": 128, "remat": "products", "attention": "cudnn", "fused_qkv": False},
        {"batch": 128, "remat": "attention", "attention": "batch"},
    )),
    Part("encode 10b", "gpu_encode:encodings", 90,
         encoding("10b", {"image": 256, "text": 1024}, *EIGHT_BITS, ENCODE_FAST)),
    Part("torch loss", PEER, 60, tuple({"kind": "loss", **case} for case in (
        {"form": "tiles", "pairs": 262_144, "tile": 4096},
        {"form": "whole", "pairs": 32_768},
        {"form": "local", "pairs": 131_072, "ranks": 8},
        {"form": "rows", "pairs": 262_144, "tile": 4096},
    )), needs=TORCH),
    Part("torch encode", PEER, 75, tuple(
        {**case, "kind": "encode"} for size, rows in (
            ("1b", {"image": 512, "text": 2048}), ("0.4b", {"image": 1024, "text": 4096}),
            ("10b", {"image": 256, "text": 1024}),
        ) for case in encoding(size, rows, {})
    ), needs=TORCH),
    Part("hf train", HUGGING_FACE, 110, tuple(
        {"kind": "train", "size": size, "batch": batch} for size, batch in (
            ("clip-h14", 128), ("clip-l14", 256), ("siglip-so400m", 128), ("clip-h14", 256),
        )
    ), needs=(*TORCH, "transformers")),
    Part("torch train 10b-slice", PEER, 80, training(
        "10b-slice", {"batch": 128, "remat": "full"}, {"batch": 64},
        stream="bfloat16", kind="train",
    ), needs=TORCH),
    Part("train 1b sycoca", STEP, 80, training(
        "1b", FAST, {"attention": "batch"},
        batch=256, remat="products", objectives="itc+ic+tg-mim",
    )),
    Part("train 0.4b", STEP, 80, training(
        "0.4b",
        {"batch": 512, "remat": "none", **FAST},
        {"batch": 1024, "remat": "none", **FAST},
        {"batch": 1024, "remat": "products", "attention": "batch"},
        {"batch": 256, "remat": "none", **FAST},
    )),
    Part("torch train 0.4b", PEER, 120, training(
        "0.4b", {}, {"compile": "model"}, batch=512, stream="bfloat16", kind="train"
    ), needs=TORCH),
    Part("encode 0.4b", "gpu_encode:encodings", 50,
         encoding("0.4b", {"image": 1024, "text": 4096}, *EIGHT_BITS, ENCODE_FAST)),
    Part("flags no command buffers", STEP, 60, (SHIPPED,),
         NO_COMMAND_BUFFERS),
    Part("flags latency hiding", STEP, 60, (SHIPPED,),
         "--xla_gpu_enable_latency_hiding_scheduler=true"),
    Part("flags no triton products", STEP, 60, (SHIPPED,),
         "--xla_gpu_enable_triton_gemm=false"),
    Part("kernels 0.4b", "gpu_trace:traces", 50,
         ({**SHIPPED, "size": "0.4b", "batch": 512},),
         NO_COMMAND_BUFFERS),
    Part("forms 1b", STEP, 130, training(  # each differs from the shipped form in one thing
        "1b",
        {**FAST, "unroll": 1}, {**FAST, "fused_qkv": True}, {**FAST, "attention": "xla"},
        {**FAST, "attention": "batch"},
        batch=256, remat="products",
    )),
    Part("remat 1b", STEP, 100, training(
        "1b", {"remat": "attention"}, {"remat": "full"}, {"remat": "dots"},
        batch=512, attention="cudnn", fused_qkv=False,
    )),
    Part("batches 1b", STEP, 130, training(
        "1b",
        {"batch": 128, "remat": "none"}, {"batch": 64, "remat": "none"},
        {"batch": 384, "remat": "none"}, {"batch": 512, "remat": "products"},
        **FAST,
    )),
    Part("hf encode", HUGGING_FACE, 75, tuple(
        {**case, "kind": "encode"} for size, rows in (
            ("clip-h14", {"image": 512, "text": 2048}), ("clip-l14", {"image": 1024, "text": 4096}),
            ("siglip-so400m", {"image": 512, "text": 2048}),
        ) for case in encoding(size, rows, {})
    ), needs=(*TORCH, "transformers")),
    Part("kernels 10b-slice", "gpu_trace:traces", 60,
         ({"size": "10b-slice", "batch": 128, "remat": "attention", "attention": "cudnn",
           "fused_qkv": False},),
         NO_COMMAND_BUFFERS),
    Part("torch loss 1m", PEER, 90,
         ({"kind": "loss", "form": "tiles", "pairs": 1_048_576, "tile": 4096},), needs=TORCH),
)  # fmt: skip


def named(names: list[str]) -> list[Part]:
    """The parts called so, or all; in the order above.

    Raises:
        SystemExit: a name that no part has.
    """
    known = {part.name for part in PARTS}
    if unknown := set(names) - known:
        raise SystemExit(f"no such part: {', '.join(sorted(unknown))}: use {', '.join(known)}")
    return [part for part in PARTS if not names or part.name in names]


def left_by(founds: list[dict]) -> list[Part]:
    """The parts that earlier runs had no time for, ceilings before them if there are any."""
    done = {
        part["name"]
        for found in founds
        for part in found["parts"]
        if part["status"] not in ("not run", "timeout")
    }
    rest = [part for part in PARTS if part.name not in done]
    return [part for part in PARTS if part.name == "ceilings" or part in rest] if rest else []


def distinct(part: Part) -> list[dict]:
    """Cases that differ from all before them in more than sizes: what a smoke run takes.

    Every path is run once, with every knob and flag, and no path twice.
    """
    seen, found = [], []
    for one in PARTS[: PARTS.index(part) + 1]:
        for case in one.cases:
            kind = one.work, one.flags, {k: v for k, v in case.items() if k not in SIZES}
            if one.work == HUGGING_FACE:  # each of its sizes is a model of its own
                kind = (*kind, case["size"])
            if kind not in seen:
                seen.append(kind)
                found += [case] if one is part else []
    return found
