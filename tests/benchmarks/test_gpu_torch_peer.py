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
    return modules("step", "torch", "torch_model")


def modules(*names: str) -> list:
    """Of the benchmark, by the ends of their names."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return [importlib.import_module(f"gpu_{name}") for name in names]
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


def test_layers_made_again_give_the_same_gradient(peer):
    import torch

    step, of_torch, model = peer
    cfg = step.model_of({"size": "1b"}, True)
    torch.manual_seed(0)
    plain, again = model.M2(cfg), model.M2(cfg, again=True)
    again.load_state_dict(plain.state_dict())
    batch = of_torch.inputs(cfg, 4)
    kept = []
    for made in (plain, again):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, id_):
            loss = made(*batch)
        loss.backward()
        kept.append(-1)
    for a, b in zip(plain.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    split = kept.index(-1)
    assert sum(kept[split + 1 : -1]) < 0.6 * sum(kept[:split])


def id_(x):
    return x


@pytest.mark.parametrize("form", ["rows", "tiles", "local"])
def test_losses_that_keep_no_matrix_are_the_whole_one(form):
    import torch
    from torch.nn import functional

    losses, model = modules("torch_loss", "torch_model")
    torch.manual_seed(0)
    image = functional.normalize(torch.randn(64, 16, dtype=torch.float64), dim=1)
    text = functional.normalize(image + 0.3 * torch.randn(64, 16), dim=1)
    scale = torch.tensor(1.5, dtype=torch.float64)
    arrays = tuple(x.detach().requires_grad_() for x in (image, text, scale))
    wanted = model.contrast(*arrays)
    wanted_grads = torch.autograd.grad(wanted, arrays)
    if form == "tiles":
        found, grads = losses.by_tiles(*arrays, 16, torch.float64)
        tolerance = 1e-5  # its sums are in float32
    else:
        tolerance = 1e-5 if form == "rows" else 1e-9
        if form == "rows":
            found = losses.by_rows(losses.local, *arrays, 16)
        else:  # every rank's share, each from the gathered features
            a, b, s = arrays
            own = torch.arange(64).split(16)
            parts = [losses.local(a[i], b[i], a, b, s, i) for i in own]
            found = sum(parts) / 128
        grads = torch.autograd.grad(found, arrays)
    assert float(found) == pytest.approx(float(wanted), rel=tolerance)
    for one, other in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, check_dtype=False)


def test_a_rank_is_held_to_the_pairs_it_covers():
    losses, loss = modules("torch_loss", "loss")
    pairs, dim = loss.TINY_PAIRS, loss.TINY_DIM
    case = {"form": "local", "pairs": 131_072, "ranks": 8}
    whole = loss.PRODUCTS * 2 * pairs**2 * dim
    found = losses.timed(case, True, "cpu", "eager", wait=lambda _: None)
    assert found["model_flops"] == whole / 8
    assert found["loss"] > 0
