# SPDX-License-Identifier: Apache-2.0
"""benchmarks/gpu.py: it counts as the library counts, and nothing that fails is silent."""

import dataclasses
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2jax import config
from m2jax.dist.mesh import make_mesh
from m2jax.dist.topology import CHIPS
from m2jax.models import params as params_lib
from m2jax.train import flops
from m2jax.train import main as train_main

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NAMES = ("clock", "parts", "device", "step", "encode", "loss", "trace", "rows", "compiled")


@pytest.fixture(scope="module")
def gpu():
    """The script's modules by the last part of their names; ``main`` is the script itself."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        found = {name: importlib.import_module(f"gpu_{name}") for name in NAMES}
        return SimpleNamespace(main=importlib.import_module("gpu"), **found)
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize("objectives", ["itc", "itc+ic+tg-mim"])
def test_flops_are_those_of_the_library(gpu, objectives):
    case = {"size": "1b", "batch": 512, "objectives": objectives}
    experiment = gpu.step.experiment_of(case, smoke=True)
    mesh = make_mesh(config.Mesh(), jax.devices()[:1])
    assert gpu.step.model_flops(experiment) == train_main.model_flops(experiment, mesh)
    sized = gpu.step.facts(experiment)["sized_flops"]
    assert 0.98 < gpu.step.model_flops(experiment) / sized < 1.3  # heads and the contrast are more


@pytest.mark.parametrize("knob", [{"remat": "full"}, {"attention": "xla"}, {"fused_qkv": False}])
def test_flops_are_of_the_model_whatever_the_program(gpu, knob):
    case = {"size": "1b", "batch": 512}
    plain, other = (gpu.step.experiment_of({**case, **k}, smoke=True) for k in ({}, knob))
    assert gpu.step.model_flops(other) == gpu.step.model_flops(plain)


@pytest.mark.parametrize("memory", [75e9, 130e9])
def test_the_slice_fits_its_share_and_one_layer_more_does_not(gpu, memory):
    def state(layers):
        cfg = config.resolve(config.Model(name="m2-encoder-10b", backbone_layers=layers))
        return gpu.step.STATE_BYTES * params_lib.count(params_lib.abstract(cfg).params)

    layers = gpu.step.slice_layers(memory)
    most = gpu.step.STATE_SHARE * memory
    assert state(layers) < 1.02 * most < 1.02 * state(layers + 1)
    assert gpu.step.model_of({"size": "10b-slice"}, False, memory).width == 4096


def test_a_compiled_program_takes_the_longer_of_flops_and_bytes(gpu):
    """Compiled for the CPU: the accounting is the same."""
    a, b = jnp.ones((64, 32)), jnp.ones((32, 16))
    program = jax.jit(lambda a, b: a @ b).lower(a, b).compile()
    done, moved = 2.0 * 64 * 32 * 16, 4.0 * (64 * 32 + 32 * 16 + 64 * 16)
    chip = CHIPS["h200"]
    for rates, wanted in [((done, 1e30), 1.0), ((1e30, moved), 1.0), ((done, moved / 3), 3.0)]:
        rated = dataclasses.replace(chip, peak_flops=rates[0], memory_rate=rates[1])
        figures, kernels = gpu.compiled.modelled(program, rated)
        assert (figures["done"], figures["moved"]) == (done, moved)
        assert figures["seconds"] == pytest.approx(wanted)
        assert sum(one.seconds for one in kernels) == pytest.approx(wanted)


def test_a_smaller_card_takes_half_the_rows(gpu):
    assert [gpu.clock.rows_for({"batch": 512}, m) for m in (130e9, 75e9)] == [512, 256]


def test_every_case_can_be_built(gpu):
    """At full size: shapes alone."""
    for part in gpu.parts.PARTS:
        for case in part.cases:
            if part.work == gpu.parts.STEP:
                cfg = gpu.step.experiment_of(case, False, 130e9)
                assert cfg.data.batch_size == case["batch"]
                for knob in set(gpu.step.KNOBS) & set(case):
                    depth = cfg.model.backbone_layers + cfg.model.vl_layers
                    wanted = min(case[knob], depth) if knob == "unroll" else case[knob]
                    assert getattr(cfg.model, knob) == wanted
            assert (BENCHMARKS / f"{part.work.split(':')[0]}.py").exists()


def test_a_smoke_run_takes_every_path_once(gpu):
    def kind(part, case):
        own = ("batch",) if part.work == gpu.parts.HUGGING_FACE else gpu.parts.SIZES
        knobs = {k: v for k, v in case.items() if k not in own}
        return json.dumps([part.work, part.flags, knobs], sort_keys=True)

    taken = [kind(p, c) for p in gpu.parts.PARTS for c in gpu.parts.distinct(p)]
    assert len(taken) == len(set(taken))
    assert set(taken) == {kind(p, c) for p in gpu.parts.PARTS for c in p.cases}


def test_measured_seconds_are_those_of_one_call(gpu):
    found = gpu.clock.measure(lambda: time.sleep(0.01), lambda _: None, 0.5)
    assert 0.01 <= found["least_seconds"] <= found["seconds"] < 0.03
    slow = gpu.clock.measure(lambda: time.sleep(0.1), lambda _: None, 0.05)
    assert (slow["windows"], slow["seconds"] >= 0.1) == (1, True)


def test_an_error_is_kept_in_its_place(gpu, tmp_path):
    rows = gpu.clock.Rows(tmp_path / "rows", 60)
    assert not rows.attempt({"a": 1}, lambda: 1 / 0)
    assert rows.attempt({"a": 2}, lambda: {"seconds": 1.0})
    rows.end = time.monotonic()
    assert not rows.attempt({"a": 3}, lambda: {"seconds": 1.0})
    found = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert [row["a"] for row in found] == [1, 2, 3]
    assert found[0]["error"].startswith("ZeroDivisionError")
    assert found[2]["error"] == "not run: no time left"


def test_a_part_that_fails_or_hangs_is_recorded(gpu, tmp_path, monkeypatch):
    part = gpu.parts.PARTS[0]
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.exit('planted')\n")
    failed = gpu.main.run(part, 60, True, str(tmp_path))
    assert (failed["status"], failed["rows"]) == ("failed", [])
    assert "planted" in failed["error"]
    (tmp_path / "sitecustomize.py").write_text("import time; time.sleep(60)\n")
    begin = time.monotonic()
    hung = gpu.main.run(part, 1, True, str(tmp_path))
    assert (hung["status"], hung["error"]) == ("timeout", "ended after 1 s")
    assert time.monotonic() - begin < 20


def test_missing_pytorch_is_said(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    part = next(part for part in gpu.parts.PARTS if "torch" in part.needs)
    found = gpu.main.run(part, 60, True, str(tmp_path))
    assert (found["status"], found["error"]) == ("skipped", "torch is not installed")


def test_missing_transformers_is_said_and_no_child_is_started(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "transformers" else name
    )
    for part in gpu.parts.PARTS:
        if part.work == gpu.parts.HUGGING_FACE:
            found = gpu.main.run(part, 60, True, str(tmp_path))
            assert (found["status"], found["rows"]) == ("skipped", [])
            assert found["error"] == "transformers is not installed"


def test_a_call_ends_in_nine_minutes_and_has_what_the_targets_need(gpu):
    assert gpu.main.BUDGET_S < 540
    names = [part.name for part in gpu.parts.PARTS]
    needed = ["ceilings", "train 1b", "torch train 1b", "loss", "kernels 1b", "encode 1b"]
    assert names[: len(needed)] == needed
    assert sum(part.seconds for part in gpu.parts.PARTS[: len(needed)]) <= gpu.main.BUDGET_S


def test_the_rest_is_what_no_run_had_time_for(gpu):
    names = [part.name for part in gpu.parts.PARTS]
    assert "torch train 0.4b" in names
    first = [{"name": n, "status": "ok"} for n in names if n != "torch train 0.4b"]
    first[2]["status"] = "failed"  # tried: its error is known
    first[-2]["status"], first[-1]["status"] = "timeout", "not run"
    left = [part.name for part in gpu.parts.left_by([{"parts": first}])]
    assert left == ["ceilings", "torch train 0.4b", *names[-2:]]
    second = [{"name": n, "status": "ok"} for n in left]
    assert gpu.parts.left_by([{"parts": first}, {"parts": second}]) == []


def test_a_torn_row_is_left_out(gpu):
    assert [gpu.main.whole(line) for line in ('{"a": 1}', '{"a": ')] == [{"a": 1}, None]


def test_the_roofline_of_the_loss_is_what_the_dense_form_does(gpu):
    pairs, dim = 64, 16
    arrays = (jnp.ones((pairs, dim)), jnp.ones((pairs, dim)), jnp.float32(1))
    jaxpr = gpu.loss.program_of({"impl": "dense"}, 1).trace(*arrays).jaxpr
    assert flops.traced(jaxpr) == gpu.loss.PRODUCTS * 2 * pairs**2 * dim


def test_the_loss_of_every_kernel_is_one_number(gpu, tmp_path):
    cases = [case for part in gpu.parts.PARTS if part.name == "loss" for case in part.cases]
    plain = next(c for c in cases if c["impl"] == "chunked" and "kernel" not in c)
    own = next(c for c in cases if c.get("kernel") == "pallas" and "blocks" not in c)
    cut = next(c for c in cases if "blocks" in c)
    blocks = dict(gpu.loss.fused.BLOCKS)
    with gpu.loss.blocks_of(cut):
        assert gpu.loss.fused.BLOCKS[2] == cut["blocks"] != blocks[2]
    assert gpu.loss.fused.BLOCKS == blocks
    gpu.loss.losses([plain, own, cut], gpu.clock.Rows(tmp_path / "rows", 300), smoke=True)
    found = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert [row.get("error") for row in found] == [None] * 3
    assert [row["loss"] for row in found] == pytest.approx([found[0]["loss"]] * 3, abs=1e-6)


def test_accuracy_is_one_minus_the_cosine(gpu):
    found = gpu.encode.off(jnp.array([[1.0, 0.0], [1.0, 1.0]]), jnp.array([[2.0, 0.0], [1.0, 0.0]]))
    assert found["mean_off"] == pytest.approx((1 - 0.5**0.5) / 2)
    assert found["most_off"] == pytest.approx(1 - 0.5**0.5)


def test_kernels_of_a_trace_are_those_of_the_program(gpu, tmp_path):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(256, 256)), jnp.float32)
    program = jax.jit(lambda x: jnp.sin(x @ x)).lower(x).compile()
    program(x).block_until_ready()
    with jax.profiler.trace(str(tmp_path)):
        for _ in range(3):
            program(x).block_until_ready()
    kernels, costs = gpu.trace.kernels_of(tmp_path), gpu.trace.costs_of(program.as_text())
    known = {name: costs[name] for name in kernels if name in costs}
    assert any(work == 2 * 256**3 for work, _, _ in known.values())
    assert all(runs == 3 for name, (_, runs) in kernels.items() if name in known)


def test_the_table_of_kernels_sums_to_the_step(gpu):
    kernels = {f"k{i}": [1.0 + i, 2] for i in range(12)}
    made = gpu.trace.table(kernels, {"k11": (5.0, 7.0, "a/b/c/dot")}, steps=2)
    assert len(made) == gpu.trace.TOP + 1
    assert made[0]["kernel"] == "k11"
    assert (made[0]["flops"], made[0]["moved"], made[0]["origin"]) == (5.0, 7.0, "b/c/dot")
    assert made[-1]["kernel"] == "2 others"
    assert sum(row["seconds"] for row in made) == sum(s for s, _ in kernels.values()) / 2
    assert sum(row["share"] for row in made) == pytest.approx(1)


FOUND = {
    "date": "2026-12-01T10:00:00", "commit": "0123456789", "card": "NVIDIA H200", "seconds": 9,
    "versions": {"jax": "0.11.2"},
    "parts": [
        {"name": "ceilings", "status": "ok", "rows": [
            {"what": "bfloat16", "seconds": 1e-3, "flops_per_s": 800e12},
            {"what": "copy", "seconds": 2e-3, "bytes_per_s": 4e12}]},
        {"name": "train 1b", "status": "ok", "rows": [
            {"size": "1b", "rows": 100, "seconds": 0.5, "model_flops": 200e12, "bytes": 5e9},
            {"size": "1b", "attention": "cudnn", "error": "UserError: a|b"}]},
        {"name": "loss", "status": "ok", "rows": [
            {"pairs": 10, "impl": "chunked", "seconds": 3.0, "model_flops": 800e12,
             "temporaries": 7e6}]},
        {"name": "kernels 1b", "status": "ok", "rows": [{"size": "1b", "kernels": [
            {"kernel": "fusion.1", "seconds": 0.01, "share": 0.5, "runs": 1, "flops": 4e12,
             "moved": 8e9}]}]},
        {"name": "torch train 1b", "status": "skipped", "error": "torch is not installed",
         "rows": []},
        {"name": "hf train", "status": "ok", "rows": [
            {"kind": "train", "size": "clip-h14", "rows": 100, "seconds": 0.5,
             "model_flops": 100e12}]},
        {"name": "torch loss", "status": "ok", "rows": [
            {"kind": "loss", "form": "local", "ranks": 8, "pairs": 10, "seconds": 2.0,
             "model_flops": 800e12, "temporaries": 3e6}]},
    ],
}  # fmt: skip


def test_shares_are_of_the_ceilings_of_the_same_run(gpu):
    text = gpu.rows.tables([FOUND])
    assert (
        "| 2026-12-01 | 01234567 | NVIDIA H200 | m2jax size=1b | 100 | - | 500.0 | 200 | 400 |"
        in text
    )
    assert "| 50.0 % | 40.4 % | 5.0 |" in text  # of 800 measured, of 989.4 on the datasheet
    assert "| m2jax pairs=10 impl=chunked | 3000.0 | 7 | 266.7 | 3.00 |" in text
    assert "| transformers size=clip-h14 | 100 | - | 500.0 | 200 | 200 | 25.0 % | 20.2 % |" in text
    assert "| PyTorch pairs=10 form=local ranks=8 | 2000.0 | 3 | 400 | 2.00 |" in text
    assert "| fusion.1 | - | 10.00 | 1 | 50.0 % | 50.0 % |" in text  # 5 ms of FLOPs, 2 of bytes
    assert "| UserError: a/b |" in text
    assert "| torch train 1b | skipped | torch is not installed |" in text
    assert gpu.rows.share(1.0, 0.0) == "-"


@pytest.mark.soak
def test_the_whole_script_runs_at_tiny_sizes(gpu, tmp_path):
    out = tmp_path / "gpu.json"
    words = [sys.executable, str(BENCHMARKS / "gpu.py"), "--out", str(out), "--smoke"]
    done = subprocess.run(
        [*words, "--budget", "900"], capture_output=True, text=True, cwd=BENCHMARKS.parent,
        check=False, timeout=1000,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    needs = {part.name: part.needs for part in gpu.parts.PARTS}
    for part in found["parts"]:
        skipped = any(importlib.util.find_spec(name) is None for name in needs[part["name"]])
        assert part["status"] == ("skipped" if skipped else "ok"), part
        for row in part["rows"]:
            assert "error" not in row, row
