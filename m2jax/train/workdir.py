# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: made, checked to be this run's, and seen by all of its processes."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from m2jax import architectures
from m2jax import config as config_lib
from m2jax.checkpoint import remote
from m2jax.checkpoint.manager import everyone
from m2jax.checkpoint.parts import Parts
from m2jax.config import Experiment, UserError
from m2jax.data.stores import is_remote

VISIBLE_AFTER_S = 60.0  # network file systems show another host's file this much later
SHARED_AFTER_S = 5.0  # the same where it only decides who copies: a wrong answer does no harm


class Opened(NamedTuple):
    """Where a process runs."""

    directory: Path  # holds what the run left; ``prepare`` makes it this run's
    parts: Parts | None = None  # where each process has a folder of its own, copied to a store


@contextlib.contextmanager
def opened(workdir: str | os.PathLike[str]) -> Iterator[Opened]:
    """The local folder to run in; a remote one is mirrored in the block.

    Where all processes see one staging folder, the first copies it to the store; else each has one
    and copies its part.

    Raises:
        UserError: the store cannot be read or written.
    """
    if not is_remote(workdir):
        yield Opened(Path(workdir))
        return
    url = str(workdir)
    directory = remote.staging(url)
    if not _shared(directory):
        own = directory.with_name(f"{directory.name}.part-{jax.process_index()}")
        parts = Parts(url, own)
        with parts.mirror:
            yield Opened(own, parts)
    elif jax.process_index() == 0:
        with remote.mirrored(url):
            everyone(True)  # what the store has is here
            yield Opened(directory)
    else:
        everyone(True)
        yield Opened(directory)


def _shared(directory: Path) -> bool:
    """Whether a staging folder is the same one in every process.

    What an earlier run left may be anywhere, so a fresh number is looked for.
    """
    if jax.process_count() == 1:
        return True
    token = int(multihost_utils.broadcast_one_to_all(np.int32(random.getrandbits(31))))
    sign = directory.with_name(f"{directory.name}.same-{token}")
    if jax.process_index() == 0:
        sign.parent.mkdir(parents=True, exist_ok=True)
        sign.write_text("")
    everyone(True)
    fine = everyone(_appears(sign, SHARED_AFTER_S))
    if jax.process_index() == 0:
        sign.unlink(missing_ok=True)
    return fine


def prepare(workdir: Path, experiment: Experiment, *, own: bool = False) -> Path:
    """Makes the work directory, with ``config.json``; one that is there stays until ``record``.

    Args:
        workdir: the folder.
        experiment: the run.
        own: each process has a folder of its own.

    Raises:
        UserError: the directory cannot be made, belongs to another architecture, or is another
            folder in another process.
    """
    if own or jax.process_index() == 0:
        _make(workdir, experiment)
    everyone(True)  # the first process is through
    if not everyone(_appears(workdir / "config.json", VISIBLE_AFTER_S)):
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


def _appears(file: Path, within_s: float) -> bool:
    """Whether a file is there, or comes within the time that a network file system takes."""
    deadline = time.monotonic() + within_s
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True
