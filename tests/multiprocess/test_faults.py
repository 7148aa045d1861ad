# SPDX-License-Identifier: Apache-2.0
"""A run of real processes that is ended and started again equals one that was left alone.

``make test-slow`` runs one of one process and one of two; ``make soak`` runs them all.
"""

import signal
import time

import numpy as np
import pytest

from tests.multiprocess import harness

pytestmark = pytest.mark.multiprocess
SHAPE = 2, 2  # processes, devices of each


def finish(workdir, processes, devices, *overrides):
    """Starts a run (again) and lets it end by itself; what its first process printed."""
    job = harness.launch(workdir, processes, devices, *overrides)
    assert job.wait() == [0] * processes, job.output()
    return job.output()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run of ``SHAPE`` that nobody disturbed."""
    workdir = tmp_path_factory.mktemp("whole")
    finish(workdir, *SHAPE)
    assert sorted(harness.losses(workdir)) == list(range(1, 25))
    return workdir


def assert_same(cut, whole):
    """To the last bit, and every sample once."""
    assert harness.losses(cut) == harness.losses(whole)
    assert harness.samples(cut) == harness.samples(whole)
    assert harness.consecutive(harness.samples(cut))


def told_then_killed(workdir, shape):
    """SIGTERM to the last process, again while it saves; SIGKILL to all in a save; to the end."""
    told = {"kind": "term", "step": 6, "process": shape[0] - 1}
    slow = {"kind": "slow", "step": 6, "after": 0.2}  # jax looks for a signal once a second
    again = [{"kind": "term", "step": step, "saving": True} for step in range(6, 24)]
    job = harness.launch(workdir, *shape, faults=(told, slow, *again))
    assert job.wait() == [42] * shape[0], job.output()
    stopped = max(harness.samples(workdir))
    assert 6 <= stopped < 24
    step = (stopped // 4 + 1) * 4
    job = harness.launch(workdir, *shape, faults=({"kind": "kill", "step": step, "saving": True},))
    assert harness.killed(job.wait()), job.output()
    finish(workdir, *shape)


@pytest.mark.slow
def test_one_process_told_to_end_then_killed(tmp_path):
    finish(tmp_path / "whole", 1, 2)
    told_then_killed(tmp_path / "cut", (1, 2))
    assert_same(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.slow
def test_told_to_end_then_killed(tmp_path, whole):
    told_then_killed(tmp_path, SHAPE)
    assert_same(tmp_path, whole)


@pytest.mark.soak
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_from_outside_to_all(tmp_path, whole, number):
    job = harness.launch(tmp_path, *SHAPE, "train.steps=2000")
    while "step 2/" not in job.output():
        time.sleep(0.1)
    job.signal(number)
    time.sleep(0.05)
    job.signal(number)  # before they have agreed
    assert job.wait() == [42, 42], job.output()
    assert "preempted after a save" in job.output()


@pytest.mark.soak
@pytest.mark.parametrize("victim", [0, 1, -1])
@pytest.mark.parametrize(("step", "saving"), [(3, False), (10, False), (8, True)])
def test_a_kill(tmp_path, whole, victim, step, saving):
    fault = {"kind": "kill", "step": step, "process": victim, "saving": saving}
    job = harness.launch(tmp_path, *SHAPE, faults=(fault,))
    codes = job.wait()
    assert {codes[victim], codes[0 if victim < 0 else victim]} == {-9}, job.output()
    finish(tmp_path, *SHAPE)
    assert_same(tmp_path, whole)


@pytest.mark.soak
def test_a_kill_of_those_who_prepare_batches(tmp_path, whole):
    """The run ends, and says why, instead of waiting for batches that never come."""
    fault = {"kind": "orphan", "step": 10, "process": 1}
    job = harness.launch(tmp_path, *SHAPE, "data.workers=1", "data.prefetch=2", faults=(fault,))
    assert 0 not in job.wait()
    assert "Worker process was terminated unexpectedly with exit code -9" in job.output(1)
    assert max(harness.losses(tmp_path)) < 24
    finish(tmp_path, *SHAPE, "data.workers=1")
    assert_same(tmp_path, whole)


@pytest.mark.soak
def test_four_processes(tmp_path):
    finish(tmp_path / "whole", 4, 1)
    fault = {"kind": "kill", "step": 9, "process": 2, "after": 0.02}
    assert -9 in harness.launch(tmp_path / "cut", 4, 1, faults=(fault,)).wait()
    told = {"kind": "term", "step": 14, "process": 3}
    job = harness.launch(tmp_path / "cut", 4, 1, faults=(told,))
    assert job.wait() == [42] * 4, job.output()
    finish(tmp_path / "cut", 4, 1)
    assert_same(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.soak
def test_a_full_disk_during_a_save(tmp_path, whole):
    """Files cannot grow past 1 kB from the save of step 8 on: RLIMIT_FSIZE stands for the disk.

    That of step 4 is through by then: a save waits for the one before.
    """
    fault = {"kind": "full", "step": 8, "saving": True, "bytes": 1000}
    job = harness.launch(tmp_path, *SHAPE, faults=(fault,))
    codes = job.wait(grace_s=120)
    assert not {0, -9} & {*codes}, job.output()  # each ends by itself, though its log is full too
    assert [p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()] == ["4"]
    finish(tmp_path, *SHAPE)
    assert_same(tmp_path, whole)


@pytest.mark.soak
def test_a_truncated_newest_checkpoint(tmp_path, whole):
    job = harness.launch(tmp_path, *SHAPE, faults=({"kind": "kill", "step": 11},))
    assert harness.killed(job.wait()), job.output()
    for file in (tmp_path / "checkpoints" / "8" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    output = finish(tmp_path, *SHAPE)
    (line,) = [s for s in output.splitlines() if s.startswith("warning:")]
    assert "checkpoints/8: damaged" in line
    assert "goes on from step 4" in line
    assert_same(tmp_path, whole)
    assert (tmp_path / "checkpoints" / "8.damaged").is_dir()


@pytest.mark.soak
def test_other_device_counts(tmp_path):
    """8 -> 4 -> 2 -> 8 devices in 2, 4, 1 and 2 processes: the same samples, losses to 1e-5."""
    finish(tmp_path / "whole", 2, 4, "train.steps=44")
    for processes, devices, stop in ((2, 4, 4), (4, 1, 12), (1, 2, 20)):
        told = {"kind": "term", "step": stop, "process": 0}
        job = harness.launch(tmp_path / "cut", processes, devices, "train.steps=44", faults=(told,))
        assert job.wait() == [42] * processes, job.output()
    finish(tmp_path / "cut", 2, 4, "train.steps=44")
    cut, whole = harness.losses(tmp_path / "cut"), harness.losses(tmp_path / "whole")
    np.testing.assert_allclose(
        [cut[step][0] for step in sorted(cut)],
        [whole[step][0] for step in sorted(whole)],
        rtol=1e-5,
    )
    assert harness.samples(tmp_path / "cut") == harness.samples(tmp_path / "whole")
    assert harness.consecutive(harness.samples(tmp_path / "cut"))


@pytest.mark.soak
def test_a_stall_is_ended_by_the_watchdog(tmp_path, whole):
    fault = {"kind": "stall", "step": 7, "process": 1}
    job = harness.launch(tmp_path, *SHAPE, "train.stall_s=30", faults=(fault,))
    assert 43 in job.wait(), job.output()
    blocked = job.output(1)
    assert "nothing happened for 3" in blocked
    assert "in _now" in blocked  # where it hangs
    finish(tmp_path, *SHAPE)
    assert_same(tmp_path, whole)


@pytest.mark.soak
def test_eight_processes_in_a_ring(tmp_path):
    """Two independent contrastive loops in one step: gloo aborts when they run side by side."""
    finish(tmp_path, 8, 1, "loss.contrastive.impl=ring", "train.steps=6")


@pytest.mark.soak
def test_a_shard_in_two_processes_is_refused(tmp_path):
    job = harness.launch(tmp_path, 2, 1, "mesh.model=2", "mesh.data=1")
    assert job.wait() == [2, 2]
    assert "1 shards of the batch do not lie whole in 2 processes" in job.output(1)
