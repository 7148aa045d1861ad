# SPDX-License-Identifier: Apache-2.0
"""Which launcher is recognised, what is read from it, and two real processes that meet."""

import json
import os
import socket
import subprocess
import sys

import pytest

from m2jax.config import UserError
from m2jax.dist import bootstrap
from m2jax.dist.launchers import Found, detect, first_host

EXPLICIT = {"M2JAX_COORDINATOR": "h0:1234", "M2JAX_NUM_PROCESSES": "4", "M2JAX_PROCESS_ID": "3"}
SKYPILOT = {
    "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NODE_RANK": "1",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_TASKS_PER_NODE": "8(x2)",
}
GKE_TPU = {"TPU_WORKER_HOSTNAMES": "w0,w1,w2,w3", "TPU_WORKER_ID": "2"}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}
EIGHT_GPUS = {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7", "SLURM_GPUS_ON_NODE": "8"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, Found(via="single")),
        (EXPLICIT, Found(via="explicit", coordinator="h0:1234", count=4, index=3)),
        (SKYPILOT, Found(via="skypilot", coordinator="10.0.0.1:55528", count=2, index=1)),
        # 1531576320 / 4096 = 373920, and 373920 mod 4096 = 1184
        (OPEN_MPI, Found(via="openmpi", coordinator="10.96.0.1:62624", count=2, index=1)),
        (SLURM, Found(via="slurm", coordinator="gpu003:61441", count=16, index=9)),
        (GKE_TPU, Found(via="gke-tpu", coordinator="w0:8482", count=4, index=2)),
        (KUBERNETES, Found(via="kubernetes", ask_jax="k8s")),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, Found(via="mpi4py", ask_jax="mpi4py")),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}, Found(via="single")),  # sbatch, no srun
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, Found(via="single")),  # a plain pod
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, Found(via="gke-tpu")),
    ],
)
def test_each_launcher_is_read(environ: dict[str, str], expected: Found) -> None:
    assert detect(environ) == expected


def test_slices_are_counted_one_after_the_other() -> None:
    environ = GKE_TPU | {
        "MEGASCALE_NUM_SLICES": "3",
        "MEGASCALE_SLICE_ID": "2",
        "MEGASCALE_COORDINATOR_ADDRESS": "job-slice-0-0.job:8080",
    }
    assert detect(environ) == Found(
        via="gke-tpu", coordinator="job-slice-0-0.job:8482", count=12, index=10
    )


@pytest.mark.parametrize(
    ("environ", "via"),
    [
        (EXPLICIT | SKYPILOT | SLURM, "explicit"),
        (SKYPILOT | KUBERNETES, "skypilot"),
        (OPEN_MPI | SLURM, "openmpi"),
        (GKE_TPU | KUBERNETES, "gke-tpu"),
        (SLURM | {"M2JAX_NUM_PROCESSES": "1"}, "explicit"),
    ],
)
def test_the_inner_launcher_wins(environ: dict[str, str], via: str) -> None:
    assert detect(environ).via == via


@pytest.mark.parametrize(
    ("changes", "gpus"),
    [
        (EIGHT_GPUS, (1,)),  # one task per GPU, all visible
        ({"CUDA_VISIBLE_DEVICES": "5", "SLURM_GPUS_ON_NODE": "8"}, ()),  # bound by --gpus-per-task
        (EIGHT_GPUS | {"SLURM_TASKS_PER_NODE": "1(x2)", "SLURM_LOCALID": "0"}, ()),  # all eight
        (EIGHT_GPUS | {"SLURM_TASKS_PER_NODE": "4(x2)"}, (2, 3)),
        (EIGHT_GPUS | {"SLURM_TASKS_PER_NODE": "8,2"}, (4, 5, 6, 7)),  # this is node 1
        (EIGHT_GPUS | {"JAX_LOCAL_DEVICE_IDS": "6,7"}, (6, 7)),
        ({"JAX_LOCAL_DEVICE_IDS": "0"}, (0,)),
    ],
)
def test_tasks_of_a_slurm_node_share_its_gpus(
    changes: dict[str, str], gpus: tuple[int, ...]
) -> None:
    assert detect(SLURM | changes).local_devices == gpus


def test_jax_variables_overrule_the_address() -> None:
    assert detect(SLURM | {"JAX_COORDINATOR_PORT": "7"}).coordinator == "gpu003:7"
    whole = {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:9"}
    assert detect(SLURM | whole).coordinator == "127.0.0.1:9"


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"M2JAX_COORDINATOR": "h:1"}, "M2JAX_NUM_PROCESSES: not set"),
        (EXPLICIT | {"M2JAX_COORDINATOR": "h0"}, "has no port"),
        (EXPLICIT | {"M2JAX_PROCESS_ID": "4"}, r"must be in 0\.\.3"),
        (EXPLICIT | {"M2JAX_PROCESS_ID": "x"}, "'x' is no number"),
        (SLURM | EIGHT_GPUS | {"SLURM_TASKS_PER_NODE": "3(x2)"}, "do not divide"),
        (
            SLURM
            | {"SLURM_TASKS_PER_NODE": "1(x2)", "SLURM_GPUS_ON_NODE": "8"}
            | {"CUDA_VISIBLE_DEVICES": "0"},
            "sees 1 of its 8 GPUs",
        ),
        (SLURM | {"SLURM_TASKS_PER_NODE": "many"}, "not a list of counts"),
        (OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "7;pipe"}, "holds no address"),
        (SLURM | {"JAX_LOCAL_DEVICE_IDS": "a"}, "not integers"),
    ],
)
def test_bad_variables_are_named(environ: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        detect(environ)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node001", "node001"),
        ("node001,host2", "node001"),
        ("node[001-015],host2", "node001"),
        ("node[7,9-15]", "node7"),
        ("rack[1-2]-gpu", "rack1-gpu"),
    ],
)
def test_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_open_mpi_over_ipv6() -> None:
    uri = {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp6://[fe80::1,2620::2]:43370"}
    assert detect(OPEN_MPI | uri).coordinator == "[fe80::1]:61441"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap.importlib.util, "find_spec", lambda name: None)
    for name, value in KUBERNETES.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"install m2jax\[k8s\]"):
        bootstrap.start(quiet=True)


def test_one_process_needs_no_coordinator(capsys: pytest.CaptureFixture[str]) -> None:
    found = bootstrap.start()
    assert (found.index, found.count, found.devices, found.via) == (0, 1, 8, "single")
    line = capsys.readouterr().err
    assert line == "process 1 of 1, 8 local of 8 devices (cpu), via single\n"


_CHILD = """
import json, sys
import m2jax
found = m2jax.start()
import jax, jax.numpy as jnp
from jax.experimental import multihost_utils
mine = jnp.arange(2.0) + 10 * found.index
everyone = multihost_utils.process_allgather(mine, tiled=True)
again = m2jax.start(quiet=True)
answer = [found.index, found.count, found.devices, everyone.tolist(), again == found]
print("answer", json.dumps(answer), flush=True)
"""


@pytest.mark.multiprocess
def test_two_processes_meet_and_exchange() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for index in range(2):
        environ = os.environ | {
            "M2JAX_COORDINATOR": f"127.0.0.1:{port}",
            "M2JAX_NUM_PROCESSES": "2",
            "M2JAX_PROCESS_ID": str(index),
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        }
        children.append(
            subprocess.Popen(
                [sys.executable, "-c", _CHILD],
                env=environ,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    outputs = [child.communicate(timeout=120) for child in children]
    for index, (out, err) in enumerate(outputs):
        assert children[index].returncode == 0, err
        # Gloo prints lines of its own, before this one or after it.
        (answer,) = [s.removeprefix("answer ") for s in out.splitlines() if s.startswith("answer ")]
        assert json.loads(answer) == [index, 2, 4, [0.0, 1.0, 10.0, 11.0], True]
        assert f"process {index + 1} of 2, 2 local of 4 devices (cpu), via explicit" in err
