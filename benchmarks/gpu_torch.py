# SPDX-License-Identifier: Apache-2.0
"""PyTorch doing the same work on the same card, in a process of its own.

``torch.compile``, SDPA, bfloat16 autocast, fused AdamW. JAX runs on the CPU here, for FLOPs alone.
``compile="layers"`` compiles the layer once and uses it everywhere (PyTorch's regional compilation,
a tenth of the compile time); ``compile="model"`` compiles all at once. ``remat="full"``
checkpoints every layer, for what would not fit.
"""

import dataclasses
import functools
from collections.abc import Callable

import gpu_torch_loss
import torch
from gpu_clock import Rows, measure, rows_for
from gpu_step import TINY_ROWS, experiment_of, model_flops, model_of
from gpu_torch_model import M2, Layer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# On a CPU nothing is timed that counts: the program is captured as for a card, and run as it is.
BACKEND = "inductor" if DEVICE == "cuda" else "aot_eager"
SECONDS = 2.5
JAX_SHARE = 0.92  # of the card's memory, that JAX may use: a slice of the 10B model fits that


def wait(_) -> None:
    """Returns when the card is idle."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def memory() -> float:
    """Bytes of the card; of a CPU, what a small card has."""
    return torch.cuda.get_device_properties(0).total_memory if DEVICE == "cuda" else 16e9


def peers(cases: list[dict], rows: Rows, smoke: bool) -> None:
    """Every case in turn."""
    each(cases, rows, smoke, {"train": _train, "encode": _encode, "loss": _loss})


def each(cases: list[dict], rows: Rows, smoke: bool, kinds: dict[str, Callable]) -> None:
    """Runs cases by their kind; memory is given back in between."""
    torch.set_float32_matmul_precision("high")
    for case in cases:
        rows.attempt(case, lambda case=case: kinds[case["kind"]](case, smoke))
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def peak() -> dict:
    """Most bytes that tensors took."""
    return {"bytes": torch.cuda.max_memory_allocated()} if DEVICE == "cuda" else {}


def model(case: dict, smoke: bool, *, compiled: bool = True) -> tuple[M2, object]:
    """A model on the card with its config."""
    cfg = model_of({"size": case["size"]}, smoke, JAX_SHARE * memory())
    with torch.device(DEVICE):
        made = M2(
            cfg, getattr(torch, case.get("stream", "float32")), again=case.get("remat") == "full"
        )
    if compiled and case.get("compile", "layers") == "layers":
        for part in made.modules():
            if isinstance(part, Layer):
                part.compile(dynamic=False, backend=BACKEND)
    elif compiled and case["compile"] == "model":
        made.compile(dynamic=False, backend=BACKEND)
    return made, cfg


def inputs(cfg, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random bytes, ids and masks."""
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (rows, 3, cfg.image_size, cfg.image_size), dtype=torch.uint8)
    ids = torch.randint(0, min(250, cfg.vocab_size), (rows, cfg.max_text_len))
    least = min(8, cfg.max_text_len)
    lengths = torch.randint(least, cfg.max_text_len + 1, (rows, 1))
    mask = torch.arange(cfg.max_text_len) < lengths
    return pixels.to(DEVICE), ids.to(DEVICE), mask.to(DEVICE)


def trainer(made: M2):
    """A whole step as a function of a batch: what ``m2jax.train.step`` does, in PyTorch's way."""
    options = {"lr": 1e-3, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.1}
    optimizer = torch.optim.AdamW(made.parameters(), fused=True, **options)

    def step(*batch: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = made(*batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(made.parameters(), 1.0, foreach=True)
        optimizer.step()
        return loss.detach()

    return step


def _train(case: dict, smoke: bool) -> dict:
    made, cfg = model(case, smoke)
    rows = TINY_ROWS if smoke else rows_for(case, memory())
    step, batch = trainer(made), inputs(cfg, rows)
    step(*batch)
    step(*batch)  # the optimiser's own state is made in the first
    found = measure(lambda: step(*batch), wait, 0.2 if smoke else SECONDS)
    experiment = experiment_of({"size": "1b", "batch": rows}, smoke, 1e12)
    return {
        "rows": rows,
        "layers": cfg.backbone_layers + cfg.vl_layers,
        **found,
        **peak(),
        "loss": float(step(*batch)),
        "model_flops": model_flops(dataclasses.replace(experiment, model=cfg)),
    }


@torch.inference_mode()
def _encode(case: dict, smoke: bool) -> dict:
    made, cfg = model({**case, "stream": "bfloat16"}, smoke)
    made = made.eval().to(torch.bfloat16)
    rows = TINY_ROWS if smoke else rows_for(case, memory())
    pixels, ids, mask = inputs(cfg, rows)

    def call():
        with torch.autocast(DEVICE, torch.bfloat16):
            return made.encode_image(pixels) if case["modality"] == "image" else made.encode_text(
                ids, mask
            )  # fmt: skip

    call()
    return {"rows": rows, **measure(call, wait, 0.1 if smoke else 1.0), **peak()}


def _loss(case: dict, smoke: bool) -> dict:
    return gpu_torch_loss.timed(case, smoke, DEVICE, BACKEND, wait)


@functools.cache
def versions() -> dict:
    """What the peers are."""
    return {"torch": torch.__version__, "cuda": str(torch.version.cuda)}
