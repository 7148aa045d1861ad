# SPDX-License-Identifier: Apache-2.0
"""The plan of a real step for a TPU slice, planted miscounts, and the step that train runs."""

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from m2jax import config
from m2jax.cli.main import main as command
from m2jax.config import UserError
from m2jax.dist.mesh import make_mesh
from m2jax.dist.topology import describe
from m2jax.plan import compile as compile_lib
from m2jax.plan import contrast, hlo, loops, planner, report
from m2jax.plan.collectives import Collective
from tests.plan.test_largest import plans

tpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed (it exists for Linux on x86-64 alone)",
)


def small() -> config.Experiment:
    """A step that compiles in seconds: one layer a tower."""
    model = config.Model(
        width=128, heads=2, backbone_layers=2, vl_layers=1, dtype="bfloat16", remat="full"
    )
    return config.Experiment(
        model=config.resolve(model),
        data=config.Data(batch_size=256),
        mesh=config.Mesh(fsdp=4),
    )


@pytest.fixture(scope="module")
def compiled() -> compile_lib.Compiled:
    return compile_lib.compile_step(small(), describe("v5e:2x4"))


@pytest.fixture(scope="module")
def made(compiled: compile_lib.Compiled) -> planner.Plan:
    return planner._account(blank(compiled), compiled)


def blank(compiled: compile_lib.Compiled) -> planner.Plan:
    machine = describe("v5e:2x4")._replace(devices=tuple(compiled.mesh.devices.flat))
    return planner.Plan(
        topology=machine,
        mesh=dict(compiled.mesh.shape),
        batch_size=256,
        memory=compiled.memory,
        compile_seconds=compiled.seconds,
        model_flops=compiled.model_flops / 8,
    )


@tpu
@pytest.mark.slow
def test_a_plan_of_a_tpu_slice(made: planner.Plan, tmp_path: Path) -> None:
    assert made.fits
    assert made.mesh == {"replica": 1, "data": 2, "fsdp": 4, "model": 1}
    assert made.checks is not None
    assert 0.95 < made.checks.compiled_to_traced < 1.05
    assert 1.0 <= made.checks.traced_to_sizes < 1.1
    assert 0 < made.mfu <= made.mfu_compute_only < 0.75
    # Two moments lie as their parameters do (frozen ones have none): nothing is replicated.
    assert 1.5 * made.memory.parameters < made.memory.optimizer < 2 * made.memory.parameters
    # Where the compute goes adds up to the compute, and to the arithmetic.
    assert sum(one.seconds for one in made.hot) == pytest.approx(made.times.compute, rel=0.02)
    assert sum(one.flops for one in made.hot) == pytest.approx(made.flops)
    assert any("dot_general" in one.origin for one in made.hot)
    axes = {(one.kind, one.axis) for one in made.collectives}
    assert ("all-gather", "fsdp") in axes  # weights, layer by layer
    assert ("all-reduce", "data") in axes or ("all-reduce", "data+fsdp") in axes  # gradients
    inside = [one for one in made.collectives if one.axis == "fsdp" and one.times > 1]
    assert inside  # gathers of the scanned layers run once a layer

    saved = json.loads(json.dumps(planner.as_json(made)))
    assert {
        "fits", "chips", "bytes_per_chip", "flops_per_chip", "collectives", "sent_bytes_per_chip",
        "step_seconds", "mfu", "compile_seconds",
    } <= set(saved)  # fmt: skip
    assert {"parameters", "optimizer", "temporaries", "total", "limit"} <= set(
        saved["bytes_per_chip"]
    )
    assert sum(c["bytes"] for c in saved["collectives"]) == pytest.approx(
        saved["sent_bytes_per_chip"]
    )
    text = report.table([made, made], ["a", "b"])
    assert "MFU (modelled)" in text
    assert "Modelled, not measured" in text


@tpu
def test_every_form_of_the_loss_is_compiled_alone() -> None:
    machine = describe("v5e:2x4")
    mesh = make_mesh(config.Mesh(fsdp=4), machine.devices)
    machine = machine._replace(devices=tuple(mesh.devices.flat))
    rows = {c.impl: c for c in contrast.costs(small(), machine, mesh)}
    assert tuple(rows) == config.choices(config.Contrastive, "impl")
    # 256 x 128 float32 features over 8 devices; dense gathers one side whole, forward at least.
    assert rows["dense"].sent >= 256 * 128 * 4 * 7 / 8
    for name, row in rows.items():
        assert row.temporaries is not None, f"{name}: {row.note}"
        assert row.sent >= 256 * 128 * 4 / 8, name


@tpu
def test_the_loss_is_compiled_with_the_masks_of_the_run() -> None:
    """Rows of one caption are told apart by ids, which the masked form alone reads."""
    base = small()
    masked = dataclasses.replace(base.loss.contrastive, mask_same_caption=True)
    machine = describe("v5e:2x4")
    mesh = make_mesh(config.Mesh(fsdp=4), machine.devices)
    machine = machine._replace(devices=tuple(mesh.devices.flat))
    loss = dataclasses.replace(base.loss, contrastive=masked)
    both = [
        contrast._cost("ring", one, machine, mesh).sent
        for one in (base, dataclasses.replace(base, loss=loss))
    ]
    assert both[0] > 0
    assert both[1] >= both[0]


@tpu
@pytest.mark.slow
def test_miscounted_trips_are_caught(compiled: compile_lib.Compiled, monkeypatch) -> None:
    """XLA's own mistake, planted: a loop's body counted once."""
    monkeypatch.setattr(loops, "trip_count", lambda *_: 1)
    with pytest.raises(hlo.HloError, match="a loop was miscounted"):
        planner._account(blank(compiled), compiled)


@tpu
@pytest.mark.slow
def test_missing_estimates_are_caught(compiled: compile_lib.Compiled) -> None:
    """A reader that loses the cycles of the products would beat the hardware."""
    text = compiled.text.replace('"estimated_cycles":"', '"estimated_cycles":"0')
    shortened = "".join(
        part if i % 2 == 0 else part[:1] for i, part in enumerate(_split_cycles(text))
    )
    with pytest.raises(hlo.HloError, match="estimates are missing"):
        planner._account(blank(compiled), compiled._replace(text=shortened))


def _split_cycles(text: str) -> list[str]:
    """Text and numbers of cycles in turn."""
    return re.split(r'(?<="estimated_cycles":")(\d+)', text)


@tpu
@pytest.mark.slow
def test_half_the_trace_is_caught(compiled: compile_lib.Compiled) -> None:
    with pytest.raises(hlo.HloError, match="a scan was miscounted"):
        planner._account(blank(compiled), compiled._replace(model_flops=compiled.model_flops / 2))


@tpu
def test_the_compilers_refusal_is_understood() -> None:
    device = describe("v5e:2x2").devices[0]
    place = jax.sharding.SingleDeviceSharding(device)
    huge = jax.ShapeDtypeStruct((2**16, 2**17), jnp.float32, sharding=place)
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jax.jit(lambda x: x + 1).lower(huge).compile()
    used = compile_lib.out_of_memory(str(caught.value))
    assert used is not None
    assert used >= 2 * 2**35 * 0.99  # 32 GiB read and 32 GiB written
    assert compile_lib.out_of_memory("INTERNAL: something else") is None


def test_columns_of_a_comparison() -> None:
    assert planner.variants(["mesh.fsdp=8,mesh.model=2", "data.languages=en,zh"]) == [
        ["mesh.fsdp=8", "mesh.model=2"],
        ["data.languages=en,zh"],
    ]
    with pytest.raises(UserError, match="KEY=VALUE"):
        planner.variants(["ring"])


@tpu
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--topology", "v9:2x2"], "v5p:2x2x1"),
        (["--topology", "v5e:3x5"], "libtpu refuses it"),
        (["--topology", "h100:1x2x3"], "HOSTSxGPUS"),
        (["--topology", "v5e:2x2", "--config.mesh.fsdp=3"], "there are 4"),
        (["--topology", "v5e:2x2", "--config.data.batch_size=6"], "does not divide over 4"),
        (["--topology", "v5e:2x2", "--compare", "ring"], "KEY=VALUE"),
        (["--topology", "v5e:2x2", "--compare", "mesh.fspd=2"], "no such key"),
        (["--topology", "v5e:2x2", "--largest-batch", "--compare", "mesh.fsdp=2"], "one of them"),
        (["--topology", "v5e:2x2", "--json", "/no/such/folder/x.json"], "no such folder"),
    ],
)
def test_bad_input_is_one_line(words: list[str], says: str, capsys) -> None:
    assert command(["plan", "--config", "emoji", *words]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("topology", "missing", "says"),
    [("v5p:4x4x8", "libtpu", "jax[tpu]"), ("h100:8", "jax_cuda", "jax[cuda13]")],
)
def test_a_missing_compiler_is_named(topology, missing, says, monkeypatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name.startswith(missing) else find(name)
    )
    with pytest.raises(UserError, match=missing.split("_")[0]) as caught:
        describe(topology)
    assert says in str(caught.value)


def test_nothing_of_a_plan_looks_for_an_accelerator() -> None:
    """jax reads the variable once: it must be set before anything imports jax."""
    code = (
        "import os; os.environ.pop('JAX_PLATFORMS', None)\n"
        "from m2jax.cli.main import main\n"
        "assert main(['plan', '--config', 'emoji', '--topology', 'v9:1x1']) == 2\n"
        "import jax; print(jax.config.jax_platforms)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["cpu"], done.stderr


@pytest.mark.parametrize(
    ("floor", "moved", "links", "bound"),
    [(3.0, 1.0, 2.0, "compute"), (1.0, 3.0, 2.0, "main memory"), (1.0, 2.0, 3.0, "links")],
)
def test_the_longest_of_three_times_bounds(floor, moved, links, bound) -> None:
    made = plans(10**6)(config.Experiment(), None)
    times = planner.Times(9.0, 9.0, links, floor, 0.0)
    chip = made.topology.chip
    made = dataclasses.replace(made, times=times, memory_bytes=moved * chip.memory_rate, flops=1e12)
    assert made.bound == bound
    assert planner.as_json(made)["bound"] == bound
    assert made.intensity == pytest.approx(1e12 / (moved * chip.memory_rate))
    assert f"{bound}" in report.table([made], ["a"])


def test_what_is_hidden_is_told_by_kind_and_axis() -> None:
    made = plans(10**6)(config.Experiment(), None)
    gather = Collective(
        name="a", kind="all-gather", axis="fsdp", group=8, times=10, sent=2e9, rate=1e9, waited=3.0
    )
    found = (gather, dataclasses.replace(gather, name="b", times=1, waited=1.5))
    other = dataclasses.replace(gather, name="c", kind="all-reduce", axis="data", waited=0.0)
    made = dataclasses.replace(made, collectives=(*found, other))
    rows = planner.as_json(made)["collectives"]
    assert [(r["kind"], r["seconds"], r["not_hidden_seconds"]) for r in rows] == [
        ("all-gather", 22.0, 4.5), ("all-reduce", 20.0, 0.0),
    ]  # fmt: skip
    text = report.table([made], ["a"])
    assert re.search(r"all-gather over fsdp, of +4\.500 of 22\.000", text)
    assert re.search(r"all-reduce over data, of +0\.000 of 20\.000", text)


@pytest.mark.parametrize(("ratio", "copies", "right"), [(1.0, 1, 1), (2.0, 1, 0), (2.0, 2, 1)])
def test_a_loop_counted_twice_is_caught(ratio, copies, right) -> None:
    checks = planner.Checks(ratio, 1.0, 1.0)
    if right:
        return planner.check(checks, copies=copies)
    with pytest.raises(hlo.HloError, match="a loop was miscounted"):
        planner.check(checks, copies=copies)
    return None


@pytest.mark.parametrize("name", ["v5p:8x16", "v5e:32x32", "v5e:2x2x1", "h100:16", "h100:2x2x2"])
def test_machines_that_do_not_exist(name) -> None:
    with pytest.raises(UserError, match=r"use one of|GPUs come as"):
        describe(name)


@pytest.mark.parametrize(("fitting", "code"), [(10**6, 0), (8, 3)])
def test_exit_codes_and_json(fitting: int, code: int, monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr(planner, "plan", plans(fitting))
    file = tmp_path / "plan.json"
    words = ["plan", "--config", "emoji", "--topology", "v5e:2x2", "--json", str(file)]
    assert command(words) == code
    assert json.loads(file.read_text())["fits"] is (code == 0)
    assert ("yes" if code == 0 else "NO") in capsys.readouterr().out
    assert command([*words, "--compare", "data.batch_size=256"]) == code
    assert len(json.loads(file.read_text())["plans"]) == 2
