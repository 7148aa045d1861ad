# SPDX-License-Identifier: Apache-2.0
"""Reads from the environment which launcher started this process, and who its peers are.

Pure functions of the environment: no device, no network, no jax. The order of ``detect`` is that of
trust: what a person wrote, then launchers that nest inside others, then what they nest in (SkyPilot
runs inside Kubernetes pods, ``mpirun`` inside Slurm allocations).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from m2jax.config import UserError

Environ = Mapping[str, str]

SKYPILOT_PORT = 55_528  # any free port does; all nodes must agree on it
TPU_PORT = 8482  # the one Cloud TPU opens between workers


@dataclass(frozen=True, kw_only=True)
class Found:
    """What the environment says about this run."""

    via: str  # explicit | skypilot | openmpi | slurm | gke-tpu | kubernetes | mpi4py | single
    coordinator: str = ""  # host:port of process 0
    count: int = 1  # processes
    index: int = 0  # of this process
    local_devices: tuple[int, ...] = ()  # GPUs this process takes; () is all it sees
    ask_jax: str = ""  # non-empty: jax's own detector of this name must fill in the rest


def detect(environ: Environ) -> Found:
    """The first launcher that recognises its variables; ``single`` where none does.

    Order: ``M2JAX_*`` variables, SkyPilot, Open MPI, Slurm (inside ``srun``), Cloud TPU variables
    (GKE), an indexed Kubernetes job, one process.

    Raises:
        UserError: a launcher's variables are incomplete, are no numbers, or waste GPUs.
    """
    for reader in _READERS:
        found = reader(environ)
        if found is not None:
            if not 0 <= found.index < found.count:
                raise UserError(
                    f"{found.via}: process {found.index} of {found.count}: the index must be in "
                    f"0..{found.count - 1}: check the launcher's variables"
                )
            return found
    return Found(via="single")


def _explicit(environ: Environ) -> Found | None:
    names = ("M2JAX_COORDINATOR", "M2JAX_NUM_PROCESSES", "M2JAX_PROCESS_ID")
    given = [name for name in names if environ.get(name)]
    if not given:
        return None
    if environ.get(names[1]) == "1":  # a way to say: one process, whatever surrounds it
        return Found(via="explicit")
    missing = sorted(set(names) - set(given))
    if missing:
        raise UserError(
            f"{missing[0]}: not set though {given[0]} is: set all of {', '.join(names)}"
        )
    coordinator = environ[names[0]]
    if not re.fullmatch(r".+:\d+", coordinator):
        raise UserError(f"M2JAX_COORDINATOR={coordinator}: has no port: write HOST:PORT")
    return Found(
        via="explicit",
        coordinator=coordinator,
        count=_number(environ, names[1]),
        index=_number(environ, names[2]),
        local_devices=_user_devices(environ),
    )


def _skypilot(environ: Environ) -> Found | None:
    if "SKYPILOT_NODE_IPS" not in environ:
        return None
    addresses = environ["SKYPILOT_NODE_IPS"].split()
    return Found(
        via="skypilot",
        coordinator=_address(environ, addresses[0] if addresses else "", SKYPILOT_PORT),
        count=_number(environ, "SKYPILOT_NUM_NODES"),
        index=_number(environ, "SKYPILOT_NODE_RANK"),
        local_devices=_user_devices(environ),
    )


def _open_mpi(environ: Environ) -> Found | None:
    if "OMPI_COMM_WORLD_SIZE" not in environ:
        return None
    uri = environ.get("OMPI_MCA_orte_hnp_uri", "")
    if not uri:  # Open MPI 5 has another run-time and names no launcher address
        return Found(via="mpi4py", ask_jax="mpi4py")
    launcher = re.search(r"tcp://([^,:]+)|tcp6://\[([^,\]]+)", uri)
    job = re.match(r"\d+", uri)
    if launcher is None or job is None:
        raise UserError(f"OMPI_MCA_orte_hnp_uri={uri}: holds no address: set M2JAX_COORDINATOR")
    host = launcher[1] or f"[{launcher[2]}]"
    return Found(
        via="openmpi",
        # Open MPI counts jobs in steps of 4096.
        coordinator=_address(environ, host, _job_port(int(job[0]) // 4096)),
        count=_number(environ, "OMPI_COMM_WORLD_SIZE"),
        index=_number(environ, "OMPI_COMM_WORLD_RANK"),
        local_devices=_share_of_gpus(
            environ,
            tasks=_number(environ, "OMPI_COMM_WORLD_LOCAL_SIZE"),
            rank=_number(environ, "OMPI_COMM_WORLD_LOCAL_RANK"),
        ),
    )


def _slurm(environ: Environ) -> Found | None:
    # A batch script sees SLURM_JOB_ID too; only srun sets the step's node list.
    if not {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID"} <= environ.keys():
        return None
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", "1")
    return Found(
        via="slurm",
        coordinator=_address(
            environ,
            first_host(environ["SLURM_STEP_NODELIST"]),
            _job_port(_number(environ, "SLURM_JOB_ID")),
        ),
        count=_number(
            environ, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
        ),
        index=_number(environ, "SLURM_PROCID"),
        local_devices=_share_of_gpus(
            environ,
            tasks=_tasks_on_node(tasks, _number(environ, "SLURM_NODEID", "0")),
            rank=_number(environ, "SLURM_LOCALID", "0"),
        ),
    )


def _gke_tpu(environ: Environ) -> Found | None:
    workers = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    if not workers:
        return None
    hosts = workers.split(",")
    slices = _number(environ, "MEGASCALE_NUM_SLICES", "1")
    if len(hosts) * slices == 1:
        return Found(via="gke-tpu")
    first = environ.get("MEGASCALE_COORDINATOR_ADDRESS") or hosts[0]
    slice_index = _number(environ, "MEGASCALE_SLICE_ID", "0")
    return Found(
        via="gke-tpu",
        coordinator=_address(environ, first.split(":")[0], TPU_PORT),
        count=len(hosts) * slices,
        index=_number(environ, "TPU_WORKER_ID") + slice_index * len(hosts),
    )


def _kubernetes(environ: Environ) -> Found | None:
    # The number of pods is in the job's description alone, which jax asks the API server for.
    if not {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environ.keys():
        return None
    return Found(via="kubernetes", ask_jax="k8s")


_READERS: tuple[Callable[[Environ], Found | None], ...] = (
    _explicit,
    _skypilot,
    _open_mpi,
    _slurm,
    _gke_tpu,
    _kubernetes,
)


def first_host(nodes: str) -> str:
    """The first name of a Slurm node list: ``gpu[003-010,12],login`` begins with ``gpu003``.

    Raises:
        UserError: the list is empty.
    """
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\]([^\[,]*))?", nodes)
    if match is None:
        raise UserError("SLURM_STEP_NODELIST: empty: start the program with srun")
    prefix, number, suffix = match.groups(default="")
    return prefix + number + suffix


def _tasks_on_node(counts: str, node: int) -> int:
    """Entry ``node`` of Slurm's run-length form: ``8(x2),4`` is 8, 8, 4."""
    expanded: list[int] = []
    for entry in counts.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", entry)
        if match is None:
            raise UserError(f"SLURM_TASKS_PER_NODE={counts}: not a list of counts: use srun")
        expanded += [int(match[1])] * int(match[2] or 1)
    return expanded[min(node, len(expanded) - 1)]


def _share_of_gpus(environ: Environ, *, tasks: int, rank: int) -> tuple[int, ...]:
    """Which of the GPUs it sees a process takes, so that the tasks of a node use each one once.

    ``()`` is all of them: one task per node, GPUs already bound to tasks, or no GPU at all.
    """
    chosen = _user_devices(environ)
    visible = [gpu for gpu in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    if chosen or not visible:
        return chosen
    on_node = _number(environ, "SLURM_GPUS_ON_NODE", "0")
    if tasks == 1 and len(visible) < on_node:
        raise UserError(
            f"slurm: the only task of this node sees {len(visible)} of its {on_node} GPUs: drop "
            f"--gpus-per-task, or start {on_node} tasks per node"
        )
    if tasks == 1 or len(visible) == 1:
        return ()
    if len(visible) % tasks:
        raise UserError(
            f"{tasks} tasks on a node share {len(visible)} GPUs: they do not divide: start one "
            "task per GPU, or one per node"
        )
    each = len(visible) // tasks
    return tuple(range(rank * each, (rank + 1) * each))


def _user_devices(environ: Environ) -> tuple[int, ...]:
    """``JAX_LOCAL_DEVICE_IDS``, which overrules every choice made here."""
    text = environ.get("JAX_LOCAL_DEVICE_IDS", "")
    try:
        return tuple(int(part) for part in text.split(",") if part)
    except ValueError:
        raise UserError(f"JAX_LOCAL_DEVICE_IDS={text}: not integers: write 0,1,2") from None


def _address(environ: Environ, host: str, port: int) -> str:
    """``host:port``, each of which jax's own variables overrule."""
    whole = environ.get("JAX_COORDINATOR_ADDRESS")
    return whole or f"{host}:{environ.get('JAX_COORDINATOR_PORT') or port}"


def _job_port(job: int) -> int:
    """A port of its own for each job, in the last 4096: the choice jax makes as well."""
    return 61_440 + job % 4096


def _number(environ: Environ, name: str, default: str | None = None) -> int:
    text = environ.get(name, default)
    if text is None or not re.fullmatch(r"\d+", text):
        said = "not set" if text is None else f"{text!r} is no number"
        raise UserError(f"{name}: {said}: start through the launcher, or set M2JAX_NUM_PROCESSES=1")
    return int(text)
