# SPDX-License-Identifier: Apache-2.0
"""Work directories on a store for hosts without a folder in common: each copies its own part.

Every process saves the array shards it holds into a folder of its own, and copies them to the
store. The files of all together are the checkpoint: arrays are kept as one file per shard (zarr
chunks), which no two processes write. Process 0 adds what is not an array, and the marker that
makes the checkpoint complete, once every other process has left a record of its files. A process
that restores copies the shards it needs and no others.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import posixpath
import random
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from m2jax.checkpoint import remote
from m2jax.checkpoint.store import (
    CHECKPOINTS,
    DamagedError,
    IncompleteError,
    Store,
    at_once,
    sizes_in,
)
from m2jax.config import UserError

RECORDS = "records"  # of a checkpoint: files of each process but the first, by attempt
SMALL = ("data/", "bundle/")  # items that every process reads whole
OTHERS_WITHIN_S = 600.0  # of the end of a run, for the last parts to come
MOST = 64  # steps that processes agree on


class Parts:
    """The checkpoints of a run on a store, as one of its processes sees them.

    Args:
        url: of the work directory.
        directory: this process's own folder; what another attempt left there is removed.

    Raises:
        UserError: the store cannot be read.
    """

    def __init__(self, url: str, directory: Path) -> None:
        self.directory = directory
        self._store = Store(url)
        token = multihost_utils.broadcast_one_to_all(np.int32(random.getrandbits(31)))
        self.mirror = PartMirror(self._store, directory, f"{int(token):08x}")
        if directory.exists():  # other parts of it may be gone; what was complete is on the store
            shutil.rmtree(directory)
        (directory / CHECKPOINTS).mkdir(parents=True)
        remote.take_logs(self._store, directory)
        for step in self.steps():
            with contextlib.suppress(DamagedError):  # ``restore`` says so, and sets it aside
                self._bring(step, lambda name: name.startswith(SMALL))
            remote.note(directory, step, self._store.marker(step) or b"")

    def steps(self) -> list[int]:
        """Steps that are complete on the store, in order; the same in every process."""
        found = np.full(MOST, -1, np.int64)
        if jax.process_index() == 0:
            newest = self._store.steps()[-MOST:]
            found[: len(newest)] = newest
        agreed = multihost_utils.broadcast_one_to_all(found.astype(np.int32))
        return [int(step) for step in agreed if step >= 0]

    def bring(self, step: int, abstract_state: Any) -> None:
        """Copies what this process needs to restore a checkpoint.

        Args:
            step: complete on the store.
            abstract_state: shapes with shardings, as they will be restored.

        Raises:
            DamagedError: a file is missing there, or is not as long as its marker says.
            UserError: the store does not answer: that is no damage, and ends the run.
        """
        try:
            self._bring_shards(step, abstract_state)
        except UserError:
            raise
        except Exception as error:  # each store has errors of its own
            raise UserError(
                f"{self._store.url}: step {step} could not be read ({error}): check the address "
                "and your rights, then start again"
            ) from error

    def _bring_shards(self, step: int, abstract_state: Any) -> None:
        folder = self.directory / CHECKPOINTS / str(step)
        listed = self._store.listed(step)
        grids = {posixpath.dirname(n) for n in listed if posixpath.basename(n) == ".zarray"}
        self._bring(step, lambda name: posixpath.dirname(name) not in grids or _described(name))
        wanted = chunks(folder, grids, abstract_state)
        self._bring(step, lambda name: name in wanted)

    def set_aside(self, steps: Iterable[int]) -> None:
        """Makes damaged checkpoints incomplete on the store; their files stay there."""
        for step in steps if jax.process_index() == 0 else ():
            self.mirror.spare(step)
            self._store.unmark(step)

    def forget(self, steps: Iterable[int]) -> None:
        """Lets each process copy damaged checkpoints anew once the run has made them again.

        Call it when they are no longer here, or what is damaged would be copied.
        """
        for step in steps:
            remote.forget(self.directory, step)

    def _bring(self, step: int, wanted: Any) -> None:
        folder = self.directory / CHECKPOINTS / str(step)

        def get(name: str, size: int) -> None:
            local = folder / name
            if not (local.is_file() and local.stat().st_size == size):
                self._store.get(step, name, size, folder)

        sizes = {n: size for n, size in self._store.listed(step).items() if wanted(n)}
        at_once(get, sizes.keys(), sizes.values())


def alone() -> ocp.options.MultiprocessingOptions:
    """Each process is the first of one: it makes its folders, and waits for none."""
    index = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=None, active_processes={index}, barrier_sync_key_prefix=f"process{index}"
    )


def alone_options() -> dict[str, Any]:
    """What Orbax's manager does otherwise for a part."""
    return {
        "create": False,
        "multiprocessing_options": alone(),
        # Else the first process to have made a folder tells all others that theirs are there.
        "async_options": ocp.AsyncOptions(create_directories_asynchronously=False),
    }


def registry() -> Any:
    """Orbax's handlers for a checkpoint of which each process keeps a part: a file per shard."""
    arrays = ocp.type_handlers.ArrayHandler(
        primary_host=None, replica_id=0, use_replica_parallel=False
    )
    state = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False,
        multiprocessing_options=alone(),
        type_handler_registry=ocp.type_handlers.create_type_handler_registry((jax.Array, arrays)),
    )
    words = ocp.JsonCheckpointHandler(multiprocessing_options=alone())
    found = ocp.handlers.DefaultCheckpointHandlerRegistry()
    found.add("state", ocp.args.PyTreeSave, state)
    for item in ("data", "bundle"):
        found.add(item, ocp.args.JsonSave, words)
    return found


def chunks(folder: Path, grids: set[str], abstract_state: Any) -> set[str]:
    """Names of the files that hold the shards of this process.

    Args:
        folder: of the checkpoint, with the descriptions of its arrays.
        grids: names of the arrays' folders below it.
        abstract_state: shapes with shardings.

    Raises:
        UserError: the description of an array is damaged.
    """
    found: set[str] = set()
    for path, leaf in jax.tree.leaves_with_path(abstract_state):
        name = f"state/{jax.tree_util.keystr(path, simple=True, separator='.')}"
        if name not in grids:
            continue  # Orbax says what is missing, by the name a user knows
        described = _read_grid(folder / name / ".zarray")
        shape, sides = described["shape"], described["chunks"]
        if tuple(shape) != tuple(leaf.shape):
            continue
        for place in leaf.sharding.addressable_devices_indices_map(tuple(leaf.shape)).values():
            ranges = [
                range(begin // side, -(-end // side))
                for (begin, end, _), side in zip(
                    (part.indices(size) for part, size in zip(place, shape, strict=True)),
                    sides,
                    strict=True,
                )
            ]
            numbers = itertools.product(*ranges)
            found |= {f"{name}/{'.'.join(map(str, n)) or '0'}" for n in numbers}
    return found


def _read_grid(file: Path) -> Mapping[str, Any]:
    """The description of an array, as far as it is needed here."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        sizes = [*found["shape"], *found["chunks"]]
        fits = len(found["shape"]) == len(found["chunks"]) and min(found["chunks"], default=1) > 0
        if fits and all(isinstance(n, int) for n in sizes) and found["dimension_separator"] == ".":
            return found
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    raise UserError(f"{file}: does not describe an array: use another checkpoint")


def _described(name: str) -> bool:
    """Whether a file describes arrays instead of holding one's values."""
    return posixpath.basename(name).startswith((".", "_"))


class PartMirror(remote.Mirror):
    """Copies a process's part of every checkpoint; of the first process, its logs too."""

    def __init__(self, store: Store, directory: Path, attempt: str) -> None:
        super().__init__(store, directory)
        self._attempt = attempt
        self._sent: dict[int, dict[str, int]] = {}

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        deadline = time.monotonic() + OTHERS_WITHIN_S
        while error[0] is None and (missing := self._unmarked()):
            if time.monotonic() > deadline:
                raise UserError(
                    f"{self._store.url}: step {missing[-1]}: not every process has copied its part "
                    f"within {OTHERS_WITHIN_S:.0f} s: look at their logs; start again to go on"
                )
            time.sleep(0.5)
            self.sync()

    def spare(self, step: int) -> None:
        """Leaves a step there that is no longer here, until the run has made it again."""
        self._spared.add(step)

    def _unmarked(self) -> list[int]:
        """Steps that are here and not yet copied."""
        steps = remote.steps_in(self._directory)
        return [step for step in steps if remote.noted(self._directory, step) is None]

    def _checkpoints(self, here: list[int]) -> None:
        if jax.process_index() == 0:
            super()._checkpoints(here)
            return
        for step in reversed(self._unmarked()):
            self._push(step)

    def _push(self, step: int) -> None:
        folder = self._directory / CHECKPOINTS / str(step)
        if jax.process_index() == 0:
            self._push_first(step, folder)
        elif self._store.marker(step) is None:  # else of another attempt: the first removes it
            parts = {
                name: size
                for name, size in sizes_in(folder).items()
                if name.startswith("state/") and not _common(name)
            }
            try:
                record = json.dumps(self._store.send_files(folder, parts)).encode()
            except IncompleteError:  # the run removed it meanwhile: it keeps newer ones
                return
            self._store.fs.pipe_file(self._record(step, jax.process_index()), record)
            remote.note(self._directory, step, b"a part")

    def _push_first(self, step: int, folder: Path) -> None:
        """The first process's part; then the marker, if all others are there."""
        if step not in self._sent:
            sent = self.sent(folder)
            if sent is None:
                return
            self._sent[step] = sent
        files = dict(self._sent[step])
        for process in range(1, jax.process_count()):
            record = self._store.read(CHECKPOINTS, str(step), RECORDS, self._name(process))
            if record is None:
                return  # it comes: the next pass looks again
            files |= json.loads(record)
        remote.note(self._directory, step, self._store.mark(step, files))
        self._spared.discard(step)

    def _record(self, step: int, process: int) -> str:
        return self._store.path(CHECKPOINTS, str(step), RECORDS, self._name(process))

    def _name(self, process: int) -> str:
        return f"{self._attempt}-{process}.json"

    def _files(self) -> None:
        if jax.process_index() == 0:
            super()._files()
            return
        for file in self._directory.glob("bad_batch_*.npz"):
            self._put(file)


def _common(name: str) -> bool:
    """Whether the first process writes this file of a checkpoint for all."""
    return _described(name) or posixpath.basename(name) == "commit_success.txt"
