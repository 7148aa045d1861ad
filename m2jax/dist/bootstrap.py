# SPDX-License-Identifier: Apache-2.0
"""Joins this process to its peers, whatever launched them, and says in one line what it found."""

from __future__ import annotations

import importlib.util
import contextlib
import os
import re
import sys
import time
from dataclasses import dataclass
from typing import NoReturn

import jax
from jax.experimental import multihost_utils

from m2jax.config import UserError
from m2jax.dist.host import load_devices, ready_cpu_collectives
from m2jax.dist.launchers import Found, detect

# A process that compiles holds Python's lock for minutes; jax's 100 s would take it for dead.
HEARTBEAT_TIMEOUT_S = 300
# The first process writes its report and ends copying to a store; the others wait for it to leave
# together.
SHUTDOWN_TIMEOUT_S = 3600
LAST_WORDS_S = 3


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process among its peers."""

    index: int
    count: int
    local_devices: int
    devices: int
    via: str  # the launcher, as in ``launchers.Found``
    coordinator: str = ""

    def __str__(self) -> str:
        line = (
            f"process {self.index + 1} of {self.count}, {self.local_devices} local of "
            f"{self.devices} devices ({jax.default_backend()}), via {self.via}"
        )
        return f"{line}, coordinator {self.coordinator}" if self.coordinator else line


def start(*, quiet: bool = False, timeout_s: int = 300) -> Processes:
    """Joins the run's processes; call it before anything else touches a device.

    One process needs no coordinator and gets none. A second call returns the same answer.

    Args:
        quiet: do not print the line.
        timeout_s: how long to wait for the peers, in seconds.

    Raises:
        UserError: incomplete launcher variables, a missing package, or peers that do not come.
    """
    found = detect(os.environ)
    if found.via == "single" and _on_tpu_vm():
        found = Found(via="tpu-vm", ask_jax="gcetpu")
    processes = 2 if found.ask_jax else found.count  # jax's detectors count them later
    ready_cpu_collectives(os.environ, processes=processes, local_devices=_cpu_devices())
    joins = processes > 1 and not jax.distributed.is_initialized()
    if joins:
        _join(found, timeout_s)
    load_devices()
    joined = Processes(
        index=jax.process_index(),
        count=jax.process_count(),
        local_devices=jax.local_device_count(),
        devices=jax.device_count(),
        via=found.via,
        coordinator=found.coordinator,
    )
    if joins and jax.default_backend() == "cpu":
        # Gloo connects at its first use and waits for 30 s: all are here now, but later one may
        # still compile.
        multihost_utils.sync_global_devices("m2jax.start")
    if not quiet:
        print(joined, file=sys.stderr, flush=True)
    return joined


def leave_peers(code: int) -> NoReturn:
    """Ends this process of several after a failure, without waiting for the others.

    A usual exit waits until every process leaves, and they may be waiting for this one in a
    collective. They notice that it is gone and end as well; process 0, which they notice at once,
    stays for the moment in which they may say what they failed at themselves.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # of a full disk: nothing more can be said
            stream.flush()
    if jax.process_index() == 0:
        time.sleep(LAST_WORDS_S)
    os._exit(code)


def _cpu_devices() -> int:
    """Devices that this process has if it is on a CPU."""
    flag = r"--xla_force_host_platform_device_count=(\d+)"
    forced = re.search(flag, os.environ.get("XLA_FLAGS", ""))
    asked: int = jax.config.jax_num_cpu_devices  # pyright: ignore[reportAttributeAccessIssue]
    return max(int(forced[1]) if forced else 1, asked)


def _join(found: Found, timeout_s: int) -> None:
    """Calls jax's initialisation with what was found."""
    _check_package(found)
    proxies = sorted(k for k in os.environ if k.lower() in ("http_proxy", "https_proxy"))
    if proxies:
        print(
            f"warning: {', '.join(proxies)} set: processes may fail to reach the coordinator "
            "through it: unset it, or add the nodes to no_proxy",
            file=sys.stderr,
        )
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    options: dict[str, object] = {"cluster_detection_method": found.ask_jax or "deactivate"}
    if not found.ask_jax:
        options |= {
            "coordinator_address": found.coordinator,
            "num_processes": found.count,
            "process_id": found.index,
            "local_device_ids": list(found.local_devices) or None,
        }
    try:
        jax.distributed.initialize(
            **options,  # pyright: ignore[reportArgumentType]
            initialization_timeout=timeout_s,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
            shutdown_timeout_seconds=SHUTDOWN_TIMEOUT_S,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{found.via}: process {found.index + 1} of {found.count} could not join "
            f"{found.coordinator or 'the coordinator'} ({reason}): check that process 0 runs there "
            "and the port is open"
        ) from error


def _check_package(found: Found) -> None:
    """Refuses early where jax's detector needs a package that is not installed."""
    package = {"k8s": "kubernetes", "mpi4py": "mpi4py"}.get(found.ask_jax)
    if package and importlib.util.find_spec(package) is None:
        extra = {"kubernetes": "m2jax[k8s]", "mpi4py": "m2jax[mpi]"}[package]
        raise UserError(
            f"{found.via}: the package {package} is missing: install {extra}, or set "
            "M2JAX_COORDINATOR, M2JAX_NUM_PROCESSES and M2JAX_PROCESS_ID"
        )


def _on_tpu_vm() -> bool:
    """Whether this is a Cloud TPU VM: TPU chips, their library, and a metadata server to ask."""
    chips = any(name.startswith("accel") for name in os.listdir("/dev")) or os.path.isdir(
        "/dev/vfio"
    )
    library = importlib.util.find_spec("libtpu") is not None
    return chips and library and "TPU_SKIP_MDS_QUERY" not in os.environ
