# SPDX-License-Identifier: Apache-2.0
"""The numbers beside the loss, from real runs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2jax import config
from m2jax.config import UserError
from m2jax.dist import topology
from m2jax.dist.mesh import make_mesh
from m2jax.obs.goodput import KINDS
from m2jax.obs.metrics import read_rows
from m2jax.train import main, meter
from m2jax.train.image_text import ImageTextTask
from tests.train import toy


def rows(folder):
    return read_rows(folder / "metrics.jsonl")


@pytest.mark.slow
def test_a_row_says_where_time_and_memory_went(tmp_path, monkeypatch):
    cfg = toy.experiment(monkeypatch, log_every=2)
    main.run(dataclasses.replace(cfg, log=config.Log(profile="3:5")), tmp_path)
    last = rows(tmp_path)[-1]
    assert last["samples_per_s_per_chip"] == pytest.approx(last["samples_per_s"] / 2)
    assert 0 <= last["data_wait"] < 1
    assert 0 < last["goodput"] < 1
    assert last["memory/host_peak"] > 1e8
    assert "mfu" not in last  # nobody knows the peak of this CPU
    assert last["skipped_total"] == 0
    booked = read_rows(tmp_path / "goodput.jsonl")[-1]
    assert booked["step"] == 8
    assert all(booked["seconds"][kind] > 0 for kind in KINDS if kind != "evaluation")
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_waiting_counts_only_while_devices_are_idle(monkeypatch, tmp_path):
    clock = [0.0]
    goodput = meter.Goodput(tmp_path, lambda: clock[0])
    loader = type("L", (), {"counts": {}, "parts": ()})()
    watched = meter.Meter(loader, goodput, jax.devices()[:1])

    def step(ready, wait, work):
        watched._last = {"loss": type("A", (), {"is_ready": lambda self: ready})()}
        clock[0] += wait
        watched.fed()
        clock[0] += work
        watched.stepped({"loss": watched._last["loss"], "skipped": jnp.int32(0)})

    step(True, 3, 1)
    step(False, 5, 1)
    assert goodput.seconds == {"data": 3, "step": 7}
    assert watched.row(1.0, 1.0)["data_wait"] == pytest.approx(0.3)
    step(True, 4, 0)
    assert watched.row(1.0, 1.0)["data_wait"] == pytest.approx(1.0)  # since the last row


@pytest.mark.slow
def test_utilisation_is_model_flops_over_the_datasheets_peak(tmp_path, monkeypatch):
    cfg = toy.experiment(monkeypatch, steps=4)
    chip = dataclasses.replace(topology.CHIPS["v5e"], peak_flops=1e9)
    for module in (main, meter):
        monkeypatch.setattr(module, "chip_of", lambda kind: chip)
    main.run(cfg, tmp_path / "plain")
    mesh = make_mesh(cfg.mesh, jax.devices()[:2])
    needed = main.model_flops(cfg, mesh)
    remat = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, remat="full"))
    assert main.model_flops(remat, mesh) == needed  # what is recomputed does not count
    for row in rows(tmp_path / "plain"):
        steps_per_s = row["samples_per_s"] / 16
        assert row["mfu"] == pytest.approx(needed * steps_per_s / 2e9)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 PCIe", None),
        ("cpu", None),
        ("TPU v7", None),
    ],
)
def test_chips_are_known_by_what_jax_calls_them(kind, name):
    assert topology.chip_of(kind) == (topology.CHIPS[name] if name else None)


def poisoned(monkeypatch, late):
    """Losses are NaN once ``late`` steps have moved the scale from its start."""
    real = ImageTextTask.loss

    def loss(self, params, batch, rng):
        value, metrics = real(self, params, batch, rng)
        return jnp.where(batch["concept"].sum() >= late, jnp.nan, value), metrics

    monkeypatch.setattr(ImageTextTask, "loss", loss)


class Marked(toy.ToySource):
    """Batches whose first concept is their index: those from 4 to 6 are the bad ones."""

    bad = range(4, 7)

    def batch(self, index, rows):
        batch = super().batch(index, rows)
        whole = np.zeros(16, np.int32)
        whole[0] = 1000 if index in self.bad else 0
        return {**batch, "concept": whole[rows]}


@pytest.mark.slow
def test_skipped_steps_are_counted_between_rows_and_over_restarts(tmp_path, monkeypatch):
    cfg = toy.experiment(monkeypatch, log_every=8, steps=8)
    monkeypatch.setitem(toy.loader.SOURCES, "toy", Marked)
    poisoned(monkeypatch, 1000)
    main.run(cfg, tmp_path)
    assert [(r["skipped"], r["skipped_total"]) for r in rows(tmp_path)] == [(0, 3)]
    longer = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, steps=10))
    main.run(longer, tmp_path)
    assert rows(tmp_path)[-1]["skipped_total"] == 3


@pytest.mark.slow
def test_the_batch_that_ends_a_run_is_saved_and_named(tmp_path, monkeypatch):
    cfg = toy.experiment(monkeypatch, guard=config.Guard(patience=2, rewinds=0))
    monkeypatch.setitem(toy.loader.SOURCES, "toy", Marked)
    poisoned(monkeypatch, 1000)
    with pytest.raises(UserError, match=r"skipped by step 6 .*bad_batch_6\.npz"):
        main.run(cfg, tmp_path)
    expected = Marked(cfg).batch(5, slice(0, 16))  # the sixth batch
    with np.load(tmp_path / "bad_batch_6.npz") as saved:
        assert set(saved) == set(expected)
        for name, value in expected.items():
            np.testing.assert_array_equal(saved[name], value)


@pytest.mark.slow
def test_the_realised_mixture_is_logged(tmp_path, monkeypatch):
    class Parts(toy.ToySource):
        parts = ("en", "zh")

        def batch(self, index, rows):
            part = (np.arange(16) % 4 == 0).astype(np.int32)[rows]
            skipped = np.full(len(part), index == 2, np.int32)
            return {**super().batch(index, rows), "part": part, "skipped": skipped}

    cfg = toy.experiment(monkeypatch, log_every=4, steps=8)
    monkeypatch.setitem(toy.loader.SOURCES, "toy", Parts)
    main.run(cfg, tmp_path)
    for row in rows(tmp_path):
        assert (row["data/share/en"], row["data/share/zh"]) == (0.75, 0.25)
        assert row["data/skipped"] == 16
