# SPDX-License-Identifier: Apache-2.0
"""Processes with no folder in common, on a store: each copies its part and takes it again."""

import json

import pytest

import m2jax
from m2jax.checkpoint.store import Store
from tests import object_server
from tests.multiprocess import harness, worker

pytestmark = pytest.mark.multiprocess
SHARDED = "mesh.fsdp=4", "mesh.data=1"
SCORED = "eval.suite=rows", "eval.every=8", "checkpoint.best=-cosine/0/top1"


def shards(folder):
    """Names of the files below a checkpoint's folder that hold shards of arrays."""
    found = (f for f in (folder / "state").rglob("*") if (f.parent / ".zarray").exists())
    return {f"{f.parent.name}/{f.name}" for f in found if not f.name.startswith(".")}


def staged(workdir, attempt, process, step):
    """The folder in which a process of an attempt had its part of a checkpoint."""
    (found,) = workdir.glob(f"staging-{attempt}-{process}/*.part-{process}/checkpoints/{step}")
    return found


def figures(workdir):
    """Those of the suite, by step."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    found = {row["step"]: {k: v for k, v in row.items() if "cosine" in k} for row in rows}
    return {step: values for step, values in found.items() if values}


@pytest.mark.soak
def test_a_run_of_processes_that_share_no_folder(tmp_path, monkeypatch):
    whole, cut, url = tmp_path / "whole", tmp_path / "cut", "s3://runs/parts"
    slow = {"kind": "slow", "step": 6, "after": 0.6}  # jax looks for a signal once a second
    assert harness.launch(whole, 2, 2, *SHARDED, *SCORED).wait() == [0, 0]

    def go(processes, devices, *faults):
        settings = *SHARDED, *SCORED
        job = harness.launch(cut, processes, devices, *settings, faults=faults, store=url)
        codes = job.wait()
        print("\n".join(job.output(index) for index in range(processes)))
        return codes

    with object_server.serving(monkeypatch):
        store = Store(url)
        assert go(2, 2, {"kind": "term", "step": 6, "process": 1}, slow) == [42, 42]
        stopped = store.steps()[-1]  # a job that was told to end leaves all of it on the store
        assert 6 <= stopped < 13
        assert harness.killed(go(2, 2, {"kind": "kill", "step": stopped + 3}))
        mine = [shards(staged(cut, 1, process, stopped)) for process in range(2)]
        # What is not sharded is one file, 0.0 or so, in both; of the rest each took its part.
        assert all(set(name.rpartition("/")[2]) <= {"0", "."} for name in mine[0] & mine[1])
        assert len(mine[0] - mine[1]) == len(mine[1] - mine[0]) > 100
        files = json.loads(store.marker(stopped))["files"]
        assert {"/".join(n.split("/")[-2:]) for n in files} >= mine[0] | mine[1]
        assert store.steps()[-1] >= stopped
        told = {"kind": "term", "step": stopped + 4, "process": 0}
        assert go(2, 2, told, slow) == [42, 42]
        kept = store.steps()  # checkpoint.keep, those of earlier machines removed
        saved = {*range(4, kept[-1], 4), stopped, kept[-1]}
        assert kept == sorted(saved)[-3:]
        assert go(1, 4) == [0]  # on one machine, from the parts of two
        assert store.steps()[-1] == 24
        for name in ("metrics.jsonl", "metrics.json"):
            (cut / name).write_bytes(store.read(name))
        best = store.read("checkpoints", "best").decode()
        loaded = m2jax.load(url)
    expected, found = harness.losses(whole), harness.losses(cut)
    assert found.keys() == expected.keys()
    for step, lost in found.items():
        assert lost == pytest.approx(expected[step], rel=0 if step <= kept[-1] else 1e-5)
    assert harness.consecutive(harness.samples(cut))
    # Four devices of two processes that hold a part each score like one that holds all.
    alone = worker.features(loaded, None).metrics
    assert len(alone) == 10
    last = json.loads((cut / "metrics.json").read_text())
    assert {key: last[key] for key in alone} == pytest.approx(alone, abs=1e-6)
    assert figures(cut).keys() == {8, 16, 24}
    for step, cosines in figures(cut).items():
        assert cosines == pytest.approx(figures(whole)[step], abs=0 if step <= kept[-1] else 1e-6)
    assert figures(cut)[24] == pytest.approx(alone, abs=1e-6)
    assert int(best) == min(figures(whole), key=lambda step: figures(whole)[step]["cosine/0/top1"])


@pytest.mark.soak
def test_full_disks_under_the_parts(tmp_path, monkeypatch):
    """The save of step 8 fits on no machine: the run ends, and goes on from 4 on other ones."""
    whole, cut, url = tmp_path / "whole", tmp_path / "cut", "s3://runs/full"
    assert harness.launch(whole, 2, 2, *SHARDED).wait() == [0, 0]
    with object_server.serving(monkeypatch):
        fault = {"kind": "full", "step": 8, "saving": True, "bytes": 1000}
        job = harness.launch(cut, 2, 2, *SHARDED, faults=(fault,), store=url)
        assert not {0, -9} & {*job.wait(grace_s=120)}, job.output()
        assert Store(url).steps() == [4]
        job = harness.launch(cut, 2, 2, *SHARDED, store=url)
        assert job.wait() == [0, 0], job.output()
        (cut / "metrics.jsonl").write_bytes(Store(url).read("metrics.jsonl"))
    assert harness.losses(cut) == harness.losses(whole)
    assert harness.consecutive(harness.samples(cut))
