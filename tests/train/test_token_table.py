# SPDX-License-Identifier: Apache-2.0
"""The token table's gradient on a mesh: the same numbers, and where they are summed."""

import dataclasses

import jax
import numpy as np
import pytest

from m2jax import config
from m2jax.dist.mesh import make_mesh
from m2jax.dist.sharding import AxisRules, batch_sharding, use_rules
from m2jax.models import params as params_lib
from m2jax.models.m2 import padded_vocab
from m2jax.train.main import make_task
from m2jax.train.step import make_gradient
from tests.train import toy

pytestmark = pytest.mark.slow
CASES = [(1, {"data": 2, "fsdp": 4}), (2, {"replica": 2, "data": 1, "fsdp": 2, "model": 2})]


def gradient(cfg, spec, devices):
    """The table's gradient of one batch and the text of the program that made it."""
    mesh, rules = make_mesh(spec, jax.devices()[:devices]), AxisRules()
    task = make_task(cfg, mesh)
    of = make_gradient(cfg, task, mesh)
    places = params_lib.shardings(task.model, mesh, rules)
    batch = jax.device_put(toy.ToySource(cfg).batch(0, slice(None)), batch_sharding(mesh))

    def table(params, batch):
        with use_rules(mesh, rules):
            return of(params, batch, jax.random.key(1))[1]["text_embed"]

    params = jax.jit(task.init, out_shardings=places)(jax.random.key(0))
    program = jax.jit(table, out_shardings=places["text_embed"]).lower(params, batch).compile()
    return np.asarray(program(params, batch)), program.as_text()


def agree(cfg, sizes):
    """Text of the program on eight devices, whose gradient must be that of one."""
    alone, _ = gradient(cfg, config.Mesh(), 1)
    spread, text = gradient(cfg, config.Mesh(**sizes), 8)
    assert np.abs(alone).max() > 0
    np.testing.assert_allclose(spread, alone, rtol=0, atol=1e-5 * np.abs(alone).max())
    assert text
    return text


@pytest.mark.parametrize(("accumulate", "sizes"), CASES, ids=str)
def test_it_is_made_and_summed_in_pieces(monkeypatch, accumulate, sizes):
    cfg = toy.experiment(monkeypatch, accumulate=accumulate)
    text = agree(cfg, sizes)
    width, texts = cfg.model.width, 2 * cfg.data.batch_size // accumulate
    whole = (padded_vocab(cfg.model.vocab_size), width), (texts, cfg.model.max_text_len, width)
    found = [shape for shape in whole if f"f32[{','.join(map(str, shape))}]" in text]
    assert not found, "a device holds the whole table, its gradient or the embeddings of all texts"


def test_it_is_the_sum_of_both_uses_of_a_tied_table(monkeypatch):
    cfg = toy.experiment(monkeypatch)
    loss = config.Loss(caption=config.Caption(weight=1.0, layers=1))
    agree(dataclasses.replace(cfg, loss=loss), {"data": 2, "fsdp": 2, "model": 2})


@pytest.mark.parametrize("group", [0, 4])
def test_grid_adds_up_over_micro_batches_too(monkeypatch, group):
    """As the configs of 256 GPUs have it, by parts of axes and by a whole one."""
    cfg = toy.experiment(monkeypatch, accumulate=2)
    contrast = dataclasses.replace(cfg.loss.contrastive, impl="grid", group=group)
    grid = dataclasses.replace(cfg, loss=dataclasses.replace(cfg.loss, contrastive=contrast))
    alone, _ = gradient(cfg, config.Mesh(), 1)
    spread, _ = gradient(grid, config.Mesh(data=2, fsdp=4), 8)
    np.testing.assert_allclose(spread, alone, rtol=0, atol=1e-5 * np.abs(alone).max())
