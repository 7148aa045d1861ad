# SPDX-License-Identifier: Apache-2.0
"""Why a job that is about to start will not: what can be seen from inside one of its processes.

``m2jax doctor`` shows these; ``launch/diagnosis.md`` explains them, and those that cannot be seen.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

SHM_NEEDED = 2**30  # bytes; containers get 64 MB, NCCL asks for tens of MB per GPU pair
DRIVER = Path("/proc/driver/nvidia/version")

Resolve = Callable[[str, int], object]


class Finding(NamedTuple):
    """One thing looked at."""

    name: str
    ok: bool
    says: str
    mend: str = ""


def findings(
    environ: Mapping[str, str],
    *,
    via: str,
    coordinator: str,
    platform: str,
    resolve: Resolve = socket.getaddrinfo,
    shm: Path = Path("/dev/shm"),
    driver: Path = DRIVER,
) -> list[Finding]:
    """What speaks for and against this process joining its peers.

    Args:
        environ: of the process.
        via: the launcher that was recognised, ``single`` if none was.
        coordinator: where its processes meet, HOST:PORT; "" if nobody said.
        platform: what jax runs on here: cpu, gpu or tpu.
        resolve: looks a host name up.
        shm: the shared-memory file system.
        driver: exists where NVIDIA's driver is loaded.
    """
    looked = [_launcher(environ, via), _proxy(environ, via)]
    if coordinator:
        looked.append(_coordinator(coordinator, resolve))
    if environ.get("M2JAX_DATA"):
        looked.append(_data(Path(environ["M2JAX_DATA"])))
    if driver.exists():
        looked += [_gpu(platform), _shm(shm)]
    return looked


def _launcher(environ: Mapping[str, str], via: str) -> Finding:
    around = [name for name in ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID") if environ.get(name)]
    if via == "single" and around:
        says = f"none, though {around[0]} is set: every process would run alone"
        mend = "start with srun" if around[0].startswith("SLURM") else "start with mpirun"
        return Finding("launcher", False, says, f"{mend}, or set M2JAX_COORDINATOR and its like")
    return Finding("launcher", True, "none: one process" if via == "single" else via)


def _proxy(environ: Mapping[str, str], via: str) -> Finding:
    names = sorted(name for name in environ if name.lower() in ("http_proxy", "https_proxy"))
    if via == "single" or not names:
        return Finding("proxy", True, "none in the way")
    says = f"{', '.join(names)}: processes may look for their peers behind it"
    return Finding("proxy", False, says, "unset it in the job, or add the nodes to no_proxy")


def _coordinator(coordinator: str, resolve: Resolve) -> Finding:
    host, _, port = coordinator.rpartition(":")
    try:
        resolve(host.strip("[]"), int(port))
    except OSError as error:
        says = f"{host}: this host does not know the name ({error.strerror or error})"
        return Finding("coordinator", False, says, "JAX_COORDINATOR_ADDRESS=IP:PORT")
    return Finding("coordinator", True, coordinator)


def _data(folder: Path) -> Finding:
    if folder.is_dir() and os.access(folder, os.R_OK):
        return Finding("M2JAX_DATA", True, str(folder))
    return Finding("M2JAX_DATA", False, f"{folder}: cannot be read here", "mount it on every host")


def _gpu(platform: str) -> Finding:
    if platform == "cpu":
        says = "NVIDIA's driver is loaded, but jax runs on the processor"
        return Finding("gpu", False, says, "pip install 'jax[cuda13]', and look at nvidia-smi")
    return Finding("gpu", True, "jax uses it")


def _shm(folder: Path) -> Finding:
    try:
        size = os.statvfs(folder)
    except OSError:
        return Finding("/dev/shm", False, "missing", "docker run --shm-size=16g")
    there = size.f_blocks * size.f_frsize
    says = f"{there / 2**20:,.0f} MiB"
    mend = "a memory volume at /dev/shm, or docker run --shm-size=16g"
    return Finding("/dev/shm", there >= SHM_NEEDED, f"{says} for NCCL", mend)
