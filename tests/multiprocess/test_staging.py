# SPDX-License-Identifier: Apache-2.0
"""Two processes of a run on a store, each with a staging folder of its own: refused in one line."""

import os
import socket
import subprocess
import sys

import pytest

from tests.multiprocess.harness import LAUNCHERS, ROOT

pytestmark = [pytest.mark.multiprocess, pytest.mark.soak]
PROGRAM = """
import sys
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from m2jax.config import UserError
from m2jax.train import workdir
workdir.VISIBLE_AFTER_S = 2.0
try:
    with workdir.opened("memory://bucket/run"):
        print("opened", flush=True)
        workdir.everyone(True)
except UserError as error:
    print(error, flush=True)
    workdir.everyone(True)
"""


@pytest.mark.parametrize("shared", [True, False])
def test_staging_folders_of_two_processes(tmp_path, shared):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    kept = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHERS)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, address, str(index)],
            cwd=ROOT,
            env=kept
            | {"M2JAX_STAGING": str(tmp_path / ("one" if shared else str(index)))}
            | {"JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    said = [p.communicate(timeout=300)[0] for p in processes]
    assert [p.returncode for p in processes] == [0, 0]
    expected = "opened" if shared else "set M2JAX_STAGING to a folder on a file system that all"
    assert all(expected in text for text in said), said
