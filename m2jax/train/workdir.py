# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: made, checked to be this run's, and seen by all of its processes."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from m2jax import architectures
from m2jax import config as config_lib
from m2jax.checkpoint import remote
from m2jax.checkpoint.manager import everyone
from m2jax.config import Experiment, UserError
from m2jax.data.stores import is_remote

VISIBLE_AFTER_S = 60.0  # network file systems show another host's file this much later


@contextlib.contextmanager
def opened(workdir: str | os.PathLike[str]) -> Iterator[Path]:
    """The local folder to run in; a remote one is mirrored in the block.

    It holds what the run left there, in every process; ``prepare`` makes it this run's.

    Raises:
        UserError: the store cannot be read or written; or the staging folder of a remote one is not
            the same in every process.
    """
    if not is_remote(workdir):
        yield Path(workdir)
        return
    directory = remote.staging(str(workdir))
    if jax.process_index() == 0:
        with remote.mirrored(str(workdir)):
            _same_staging(directory, str(workdir))
            yield directory
    else:
        _same_staging(directory, str(workdir))
        yield directory


def _same_staging(directory: Path, url: str) -> None:
    """Refuses a staging folder that is another one in another process.

    Processes write their part of a checkpoint into one folder, and the first joins the parts. What
    an earlier run left may be anywhere, so a fresh number is looked for.
    """
    token = int(multihost_utils.broadcast_one_to_all(np.int32(random.getrandbits(31))))
    sign = directory / f"same-{token}.tmp"  # not copied to the store
    if jax.process_index() == 0:
        sign.write_text("")
    everyone(True)
    fine = everyone(_appears(sign))
    if jax.process_index() == 0:
        sign.unlink(missing_ok=True)
    if not fine:
        raise UserError(
            f"--workdir {url}: {directory} is not the same folder in every process: set "
            "M2JAX_STAGING to a folder on a file system that all hosts share"
        )


def prepare(workdir: Path, experiment: Experiment) -> Path:
    """Makes the work directory, with ``config.json``; one that is there stays until ``record``.

    Raises:
        UserError: the directory cannot be made, belongs to another architecture, or is another
            folder in another process.
    """
    if jax.process_index() == 0:
        _make(workdir, experiment)
    everyone(True)  # the first process is through
    if not everyone(_appears(workdir / "config.json")):
        raise UserError(
            f"--workdir {workdir}: not the same folder in every process: put it on a file system "
            "that all hosts share"
        )
    return workdir


def _make(workdir: Path, experiment: Experiment) -> None:
    file = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if file.exists():
            _same_architecture(file, experiment)
        else:
            _write(file, experiment)
    except OSError as error:
        raise UserError(
            f"--workdir {workdir}: {error.strerror}: name a directory you may write to"
        ) from error


def record(workdir: Path, experiment: Experiment) -> None:
    """Notes the config of a run that has begun, or goes on with other settings."""
    if jax.process_index() == 0:
        _write(workdir / "config.json", experiment)


def _write(file: Path, experiment: Experiment) -> None:
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(config_lib.to_json(experiment), encoding="utf-8")
    os.replace(temporary, file)


def _same_architecture(file: Path, experiment: Experiment) -> None:
    saved = config_lib.from_json(file.read_text(encoding="utf-8"), str(file))
    for key in architectures.SIZES:
        had, want = getattr(saved.model, key), getattr(experiment.model, key)
        if had != want:
            raise UserError(
                f"{file}: model.{key} is {had} there and {want} in this run: "
                "name another --workdir or use that run's config"
            )


def _appears(file: Path) -> bool:
    """Whether a file is there, or comes within the time that a network file system takes."""
    deadline = time.monotonic() + VISIBLE_AFTER_S
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True
