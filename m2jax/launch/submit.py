# SPDX-License-Identifier: Apache-2.0
"""Hands a rendered job to its scheduler."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from m2jax.config import UserError
from m2jax.launch.job import Job

# Target -> the command, to which the job file is added.
COMMANDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "slurm": ("sbatch",),
        "jobset": ("kubectl", "create", "-f"),
        "xpk": ("bash",),
        "tpu-vm": ("bash",),
        "sky": ("sky", "jobs", "launch", "--yes"),
        "mpi": ("bash",),
    }
)
_NEEDED: Mapping[str, str] = MappingProxyType({"xpk": "xpk", "tpu-vm": "gcloud", "mpi": "mpirun"})


def submit(job: Job, target: str, text: str) -> int:
    """Submits, with the scheduler's own words on the terminal.

    Returns:
        The exit code: the run's where the target runs it here (``mpi``), else the scheduler's.

    Raises:
        UserError: the scheduler's command is not here.
    """
    program = _NEEDED.get(target, COMMANDS[target][0])
    if shutil.which(program) is None:
        raise UserError(
            f"--submit: {program} is not on the PATH: submit where it is, or leave --submit out "
            "and take the printed job there"
        )
    with tempfile.TemporaryDirectory(prefix="m2jax-") as folder:
        file = Path(folder) / job.name  # all these tools keep a copy of their own
        file.write_text(text, encoding="utf-8")
        if target == "tpu-vm":
            steps = ["create"], ["start"]
        else:
            steps = ([f"--secret={name}" for name in job.secrets] if target == "sky" else [],)
        for words in steps:
            done = subprocess.run([*COMMANDS[target], str(file), *words], check=False)
            if done.returncode:
                return done.returncode
    return 0
