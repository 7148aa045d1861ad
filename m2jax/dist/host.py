# SPDX-License-Identifier: Apache-2.0
"""What the memory allocator and libtpu must be told about this host before jax starts."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path

TUNABLE = "GLIBC_TUNABLES"
HUGE_PAGES = "glibc.malloc.hugetlb=1"  # malloc asks for transparent huge pages (glibc >= 2.35)

PCI = Path("/sys/bus/pci/devices")
GOOGLE = "0x1ae0"  # PCI vendor of TPUs (and of Google's network cards)


def restart_with_huge_pages() -> None:
    """Starts this process again, once, with huge pages for malloc.

    XLA on the CPU allocates the step's temporaries anew each time, so every step touches hundreds of
    megabytes of fresh pages; with 4 kB pages the faults took 40 % of the demo's step
    (benchmarks/step.md). Does nothing off Linux, or where the user set the tunable.
    """
    if sys.platform == "linux" and TUNABLE not in os.environ:
        environ = {**os.environ, TUNABLE: HUGE_PAGES}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environ)


def has_tpu(devices: Path = PCI) -> bool:
    """Whether this host may have a TPU: a PCI device of Google's."""
    return any(file.read_text().strip() == GOOGLE for file in devices.glob("*/vendor"))


IN_ORDER = "--xla_cpu_enable_concurrency_optimized_scheduler"


THREADS = "PJRT_NPROC"  # of each of XLA's thread pools on the CPU; as many as cores if not set


def ready_cpu_collectives(
    environ: MutableMapping[str, str], *, processes: int, local_devices: int
) -> None:
    """Tells XLA how to run the collectives of a CPU program, where it has any.

    In program order: independent loops of one step (two contrastive losses in a ring) otherwise run
    side by side, processes meet in different orders, and gloo aborts them. With threads to spare
    between processes: a collective holds its thread until the peers come, and devices that share as
    many threads as there are cores can each hold the one that another needs.

    Must come before jax's first device. Flags that XLA does not know end a process, so accelerators
    never get this one; nor is what the user set changed.

    Args:
        environ: the environment, changed in place.
        processes: of the run.
        local_devices: of this process.
    """
    if processes * local_devices == 1 or not on_cpu(environ):
        return
    flags = environ.get("XLA_FLAGS", "")
    if IN_ORDER not in flags:
        environ["XLA_FLAGS"] = f"{flags} {IN_ORDER}=false".strip()
    if processes > 1:
        environ.setdefault(THREADS, str(max(os.cpu_count() or 1, 4 * local_devices)))


def on_cpu(environ: Mapping[str, str]) -> bool:
    """Whether jax will run on the CPU, found without starting it; no when in doubt."""
    platforms = environ.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms == "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return not (plugins or importlib.util.find_spec("jax_plugins") or has_tpu())


NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several processes may compile: none opens a device
}


@contextlib.contextmanager
def no_tpu() -> Iterator[None]:
    """Tells libtpu, which is loaded inside this block, that there is no TPU to look for.

    Without it libtpu asks a metadata server which TPU it is on and complains on the terminal. The
    variables go again at the end: jax takes some for those of a TPU pod when it looks for others.
    """
    new = [name for name in NO_TPU if name not in os.environ]
    os.environ.update({name: NO_TPU[name] for name in new})
    try:
        yield
    finally:
        for name in new:
            os.environ.pop(name, None)


def load_devices() -> None:
    """Loads jax's devices, quietly where libtpu is installed and no TPU is there.

    Comes after the processes of a run have found each other.
    """
    import jax

    with contextlib.nullcontext() if has_tpu() else no_tpu():
        jax.devices()
