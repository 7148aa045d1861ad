# SPDX-License-Identifier: Apache-2.0
"""Eight virtual CPU devices for every test, and compiled programs kept between runs."""

import importlib.util
import os
import sys
from pathlib import Path

import absl.logging
import pytest

# Read by jax when its first device is touched, so they are set before any test module is imported.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    # Eight devices share two cores' worth of threads: collectives of one program that run at the
    # same time can each hold a thread the other needs. In program order they cannot.
    + " --xla_cpu_enable_concurrency_optimized_scheduler=false"
    # Nor may a machine busy with another worker's compiling pass for a lost device.
    + " --xla_cpu_collective_call_terminate_timeout_seconds=300"
    # Two thirds of the tests' time is compiling; unoptimised code of toy models is fast enough.
    + " --xla_backend_optimization_level=0"
    + " --xla_cpu_use_fusion_emitters=false"
)
# A device waits for the others of a collective inside a thread of XLA's pool, which has as many as
# there are devices: whatever else takes one then leaves a device without, and all wait forever.
os.environ["PJRT_NPROC"] = "32"
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".cache" / "jax")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

# pymilvus sets logging up anew when it is imported, which closes all handlers there are; absl's
# closes the stream it has, which would be pytest's own, unless that is one of Python's.
absl.logging.get_absl_handler().python_handler.stream = sys.__stderr__

# A launcher around the test run must not look like the tests' own.
for name in list(os.environ):
    ours = name in ("M2JAX_GOLDEN", "M2JAX_SHARED", "M2JAX_UPDATE")  # fixtures, examples
    if name.startswith(("M2JAX_", "SLURM_", "OMPI_", "SKYPILOT_")) and not ours:
        del os.environ[name]


def pytest_collection_modifyitems(items):
    """The torch lane: skipped where PyTorch is missing; its libraries' warnings are their own."""
    missing = importlib.util.find_spec("torch") is None
    for item in items:
        if item.get_closest_marker("torch") is None:
            continue
        if missing:
            item.add_marker(pytest.mark.skip(reason="needs PyTorch: make test-torch"))
        for kind in ("DeprecationWarning", "UserWarning", "FutureWarning"):
            item.add_marker(pytest.mark.filterwarnings(f"ignore::{kind}"))
