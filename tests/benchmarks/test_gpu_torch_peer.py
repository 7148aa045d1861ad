# SPDX-License-Identifier: Apache-2.0
"""The PyTorch peer of benchmarks/gpu.py computes the library's own loss, on the same weights."""

import importlib
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2jax.dist.mesh import make_mesh
from m2jax.models.params import flatten

pytestmark = pytest.mark.torch
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def peer():
    """(gpu_step, gpu_torch, gpu_torch_model)."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return [importlib.import_module(f"gpu_{n}") for n in ("step", "torch", "torch_model")]
    finally:
        sys.path.remove(str(BENCHMARKS))


def copied(params, made, cfg):
    """The weights of an M2Encoder in the peer's modules."""
    import torch

    flat = {name: np.asarray(leaf, np.float32) for name, leaf in flatten(params).items()}

    def put(to, value):
        assert to.shape == value.shape, (to.shape, value.shape)
        to.data.copy_(torch.from_numpy(np.array(value)))

    def norm(to, name, at=slice(None)):
        put(to.weight, flat[f"{name}.scale"][at])
        put(to.bias, flat[f"{name}.bias"][at])

    def linear(to, *names, at=slice(None)):
        put(to.weight, np.concatenate([flat[f"{n}.kernel"][at] for n in names], 1).T)
        put(to.bias, np.concatenate([flat[f"{n}.bias"][at] for n in names]))

    for stack, name, way in (
        (made.image_backbone, "backbone", "A"),
        (made.text_backbone, "backbone", "B"),
        (made.vl, "vl", "A"),
    ):
        norm(stack.norm, f"{name}.norms.{way}")
        for i, layer in enumerate(stack.layers):
            at = f"{name}.blocks.{way}"
            for part in ("attn_norm", "inner_norm", "ffn_norm", "mlp_norm"):
                norm(getattr(layer, part), f"{at}.{part}", i)
            linear(layer.qkv, *(f"{at}.{x}" for x in "qkv"), at=i)
            for part in ("out", "fc1", "fc2"):
                linear(getattr(layer, part), f"{at}.{part}", at=i)
    put(made.conv.weight, flat["vision_embed.kernel"].transpose(3, 2, 0, 1))
    put(made.conv.bias, flat["vision_embed.bias"])
    put(made.cls, flat["vision_embed.cls_token"])
    put(made.image_positions, flat["image_positions"][2:])
    put(made.table.weight, flat["text_embed"][: cfg.vocab_size])
    put(made.text_positions, flat["text_positions"][2 : 2 + cfg.max_text_len])
    for head in ("image_head", "text_head", "image_vl_head", "text_vl_head"):
        put(getattr(made, head).weight, flat[f"{head}.kernel"].T)
    put(made.scale, flat["logit_scale"])
    put(made.vl_scale, flat["logit_vl_scale"])


def test_it_gives_the_same_loss_and_gradient(peer):
    import torch

    step, of_torch, model = peer
    experiment = step.experiment_of({"size": "1b", "batch": 8, "dtype": "float32"}, smoke=True)
    cfg, mesh = experiment.model, make_mesh(experiment.mesh, jax.devices()[:1])
    task = step.task_of(experiment, mesh)
    params = task.init(jax.random.key(0))
    made = model.M2(cfg)
    copied(params, made, cfg)
    pixels, ids, mask = of_torch.inputs(cfg, 8)
    rgba = np.concatenate([pixels.numpy(), np.full((8, 1, *pixels.shape[2:]), 255, np.uint8)], 1)
    batch = {
        "image": jnp.asarray(rgba.transpose(0, 2, 3, 1)[:, None]),
        "text": jnp.asarray(ids.numpy()[:, None], jnp.int32),
        "text_mask": jnp.asarray(mask.numpy()[:, None]),
        "concept": jnp.arange(8),
    }
    (wanted, _), grads = jax.jit(jax.value_and_grad(task.loss, has_aux=True))(
        params, batch, jax.random.key(1)
    )
    found = made(pixels, ids, mask)
    assert float(found.detach()) == pytest.approx(float(wanted), abs=2e-5)
    found.backward()
    for to, name in ((made.vl.layers[0].fc1, "vl.blocks.A.fc1"),):
        kernel = np.asarray(flatten(grads)[f"{name}.kernel"][0])
        np.testing.assert_allclose(to.weight.grad.numpy().T, kernel, rtol=0, atol=2e-5)
    table = np.asarray(flatten(grads)["text_embed"][: cfg.vocab_size])
    np.testing.assert_allclose(made.table.weight.grad.numpy(), table, rtol=0, atol=2e-5)
    assert torch.isfinite(made.conv.weight.grad).all()


def test_its_step_learns(peer):
    step, of_torch, model = peer
    cfg = step.model_of({"size": "1b"}, True)
    run, batch = of_torch.trainer(model.M2(cfg)), of_torch.inputs(cfg, 8)
    losses = [float(run(*batch)) for _ in range(6)]
    assert losses[-1] < losses[0]
