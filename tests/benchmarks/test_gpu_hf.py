# SPDX-License-Identifier: Apache-2.0
"""The transformers peers of benchmarks/gpu.py: their FLOPs count as the library's do."""

import dataclasses
import importlib
import sys
from pathlib import Path

import pytest

from tests.checkpoint.convert import torch_toys

pytestmark = pytest.mark.torch
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def peer():
    """(gpu_step, gpu_torch, gpu_torch_model, gpu_hf)."""
    torch_toys.torch()
    pytest.importorskip("transformers")
    sys.path.insert(0, str(BENCHMARKS))
    try:
        names = ("step", "torch", "torch_model", "hf")
        return [importlib.import_module(f"gpu_{name}") for name in names]
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_pytorch_counts_a_step_as_the_library_does(peer):
    """M2 itself, in both: only then is one's utilisation to be held against the other's.

    The library's step also changes the pictures, and multiplies weights with biases: 0.5 % here.
    """
    step, of_torch, model, hf = peer
    experiment = step.experiment_of({"size": "1b", "batch": 8}, smoke=True)
    wider = dataclasses.replace(experiment.model, width=256, heads=8)
    experiment = dataclasses.replace(experiment, model=wider)
    made, batch = model.M2(experiment.model), of_torch.inputs(experiment.model, 8)
    counted = hf.products(lambda: made(*batch).backward())
    assert counted == pytest.approx(step.model_flops(experiment), rel=0.006)


def sized(config, tokens: tuple[int, int]) -> float:
    """6 x weights x tokens, and attention's scores and sums, of both towers for one pair."""
    total = 0.0
    for tower, n in zip((config.vision_config, config.text_config), tokens, strict=True):
        width, mlp = tower.hidden_size, tower.intermediate_size
        layer = 6 * n * (4 * width**2 + 2 * width * mlp) + 12 * n**2 * width
        total += tower.num_hidden_layers * layer
    return total


@pytest.mark.parametrize(
    ("size", "tokens", "parameters"),
    [
        ("clip-l14", (257, 77), 0.428e9),
        ("clip-h14", (257, 77), 0.986e9),
        ("siglip-so400m", (256, 64), 0.878e9),
    ],
)
def test_sizes_are_the_published_ones(peer, size, tokens, parameters):
    import torch

    *_, hf = peer
    config = hf.config_of(size, False)
    with torch.device("meta"):
        made = hf.Pair(config)
    found = sum(p.numel() for p in made.parameters())
    assert found == pytest.approx(parameters, rel=0.02)
    # Patches, projections and the contrast are all that the layers leave out.
    assert 1.0 < hf.step_flops(config, 2) / (2 * sized(config, tokens)) < 1.03


@pytest.mark.parametrize("size", ["clip-l14", "siglip-so400m"])
def test_a_step_learns_with_fused_attention_and_compiled_layers(peer, size):
    _, of_torch, _, hf = peer
    config = hf.config_of(size, True)
    made = hf.Pair(config)
    attention = {made.model.config._attn_implementation}
    attention |= {t._attn_implementation for t in (config.vision_config, config.text_config)}
    made.compile_layers()
    compiled = [part for part in made.modules() if part._compiled_call_impl is not None]
    assert len(compiled) == 4  # two layers a tower
    run, batch = of_torch.trainer(made), hf.inputs(config, 8, "cpu")
    losses = [float(run(*batch)) for _ in range(6)]
    assert losses[-1] < losses[0]
    assert attention == {"sdpa"}


def test_rows_have_what_the_tables_need(peer, monkeypatch):
    *_, hf = peer
    monkeypatch.setattr(hf.Pair, "compile_layers", lambda self: None)
    case = {"kind": "train", "size": "clip-h14", "batch": 8}
    trained = hf._train(case, smoke=True)
    assert trained["model_flops"] == hf.step_flops(hf.config_of("clip-h14", True), 8)
    images, texts = (
        hf._encode({**case, "kind": "encode", "modality": m}, smoke=True) for m in ("image", "text")
    )
    # Twice as much backward as forward; nothing before the patches asks for a gradient.
    forward = images["model_flops"] + texts["model_flops"]
    assert 2.9 < trained["model_flops"] / forward < 3.1
