# SPDX-License-Identifier: Apache-2.0
"""A folder on an object store (fsspec), and when a checkpoint in it is complete.

Neither store nor library is trusted to make many objects appear at once: the files of a checkpoint
go first, then ``complete.json``, which lists them with their sizes under an identity of its own. A
checkpoint without it does not exist.
"""

from __future__ import annotations

import contextlib
import json
import posixpath
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from m2jax.config import UserError
from m2jax.data import stores

MARKER = "complete.json"
IN_FLIGHT = 16  # files on their way at a time
CHECKPOINTS = "checkpoints"
ITEMS = ("state", "data", "bundle")  # a checkpoint without one of them is none


class IncompleteError(UserError):
    """A local checkpoint that is no complete one, or ceased to be while it was copied."""


class DamagedError(UserError):
    """A checkpoint whose files are missing, truncated or changed."""


class Store:
    """A folder on an object store.

    Args:
        url: such as ``s3://bucket/runs/a``.

    Raises:
        UserError: no such protocol, or its package is not installed.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.fs, self._root = stores.opened(self.url)

    def path(self, *parts: str) -> str:
        """The address of something below the folder, as the file system wants it."""
        return posixpath.join(self._root, *parts)

    def put(self, local: Path, *parts: str) -> None:
        """Copies one file there; it appears whole or not at all."""
        self.fs.put_file(str(local), self.path(*parts))

    def read(self, *parts: str) -> bytes | None:
        """The contents of one file; ``None`` if there is none."""
        try:
            return self.fs.cat_file(self.path(*parts))
        except FileNotFoundError:
            return None

    def marker(self, step: int) -> bytes | None:
        """What makes a checkpoint complete, different for each that was ever copied there."""
        return self.read(CHECKPOINTS, str(step), MARKER)

    def steps(self) -> list[int]:
        """Steps whose checkpoint is complete, in order."""
        return [step for step in self.folders() if self.marker(step)]

    def folders(self) -> list[int]:
        """Steps of which there is anything, in order."""
        return sorted(int(name) for name in self.names(CHECKPOINTS) if name.isdigit())

    def names(self, *parts: str) -> set[str]:
        """Of the files and folders that lie there; none where there is no such folder."""
        try:
            found = self.fs.ls(self.path(*parts), detail=False)
        except FileNotFoundError:
            return set()
        return {posixpath.basename(name.rstrip("/")) for name in found}

    def remove(self, step: int) -> None:
        """Removes a checkpoint, its marker first: what is half gone is no checkpoint."""
        self.unmark(step)
        self.fs.rm(self.path(CHECKPOINTS, str(step)), recursive=True)

    def send(self, checkpoint: Path) -> dict[str, int]:
        """Copies the files of a complete local checkpoint there; ``mark`` makes it complete.

        Returns:
            Their names and sizes.

        Raises:
            IncompleteError: it lacks an item, or changed meanwhile (a run removes those that it no
                longer keeps); there is no marker then.
        """
        sizes = sizes_in(checkpoint)
        for item in ITEMS:
            if not any(name.startswith(f"{item}/") for name in sizes):
                raise IncompleteError(f"{checkpoint}: lacks {item}: not copied to {self.url}")
        self.unmark(int(checkpoint.name))
        return self.send_files(checkpoint, sizes)

    def send_files(self, checkpoint: Path, sizes: Mapping[str, int]) -> dict[str, int]:
        """Copies some files of a local checkpoint there; returns them.

        Raises:
            IncompleteError: one changed meanwhile.
        """

        def put(name: str) -> None:
            try:
                self.put(checkpoint / name, CHECKPOINTS, checkpoint.name, name)
            except FileNotFoundError:
                if (checkpoint / name).exists():  # it is the bucket that is not there
                    raise

        at_once(put, sizes)
        now = sizes_in(checkpoint)
        if any(now.get(name) != size for name, size in sizes.items()):
            raise IncompleteError(f"{checkpoint}: changed while it was copied to {self.url}")
        return dict(sizes)

    def mark(self, step: int, sizes: Mapping[str, int]) -> bytes:
        """Makes a checkpoint complete whose files are there."""
        marker = json.dumps({"id": uuid.uuid4().hex, "files": dict(sizes)}).encode()
        self.fs.pipe_file(self.path(CHECKPOINTS, str(step), MARKER), marker)
        return marker

    def unmark(self, step: int) -> None:
        """Makes a checkpoint incomplete; its files stay."""
        with contextlib.suppress(FileNotFoundError):
            if self.marker(step) is not None:
                self.fs.rm_file(self.path(CHECKPOINTS, str(step), MARKER))

    def pull(self, step: int, checkpoints: Path) -> Path:
        """Copies one complete checkpoint here; it appears in ``checkpoints`` whole or not at all.

        Where another process was faster, its copy stays.

        Raises:
            UserError: a file is missing there, or is not as long as its marker says.
        """
        final = checkpoints / str(step)
        temporary = Path(tempfile.mkdtemp(dir=checkpoints, prefix=f"{step}.pulled-"))
        try:
            inner = temporary / final.name  # with the rights of any folder, unlike the outer one
            inner.mkdir()
            self._get(step, inner)
            try:
                inner.replace(final)
            except OSError:
                if not final.is_dir():
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return final

    def _get(self, step: int, folder: Path) -> None:
        """The files of a checkpoint, each as long as the marker says."""
        sizes = self.listed(step)
        at_once(lambda name, size: self.get(step, name, size, folder), sizes, sizes.values())

    def get(self, step: int, name: str, size: int, folder: Path) -> None:
        """One file of a checkpoint, as long as the marker says.

        Raises:
            UserError: it is missing there, or not that long.
        """
        local = folder.joinpath(*name.split("/"))
        local.parent.mkdir(parents=True, exist_ok=True)
        source = self.path(CHECKPOINTS, str(step), name)
        try:
            self.fs.get_file(source, str(local))
        except FileNotFoundError:
            raise DamagedError(f"{source}: missing: remove the checkpoint to use another") from None
        if local.stat().st_size != size:
            raise DamagedError(
                f"{source}: {local.stat().st_size} bytes, not {size}: remove the checkpoint to "
                "use another"
            )

    def listed(self, step: int) -> dict[str, int]:
        """Names and sizes that the marker of a checkpoint lists; all lie inside of it.

        Raises:
            DamagedError: the marker lists none, or others.
        """
        sizes = self._sizes_of(step)
        for name in sizes:
            if posixpath.isabs(name) or not {"", ".", ".."}.isdisjoint(name.split("/")):
                raise DamagedError(
                    f"{self.url}: {MARKER} of step {step} names {name!r}, which lies outside of "
                    "the checkpoint: remove the checkpoint"
                )
        return sizes

    def _sizes_of(self, step: int) -> dict[str, int]:
        try:
            listed = json.loads(self.marker(step) or b"")["files"]
            if listed and all(isinstance(size, int) for size in listed.values()):
                return listed
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            pass
        where = self.path(CHECKPOINTS, str(step), MARKER)
        raise DamagedError(f"{where}: lists no files: remove the checkpoint to use another")


def at_once(work: Callable[..., None], *items: Iterable[Any]) -> None:
    """Does some work for each of the items, some at a time: a store answers late, not seldom."""
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        for _ in pool.map(work, *items):  # raises what one of them raised
            pass


def files(folder: Path) -> Iterator[Path]:
    """Every file below a folder, in an order that does not change."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def sizes_in(checkpoint: Path) -> dict[str, int]:
    """Names and bytes of the files of a checkpoint; empty when it goes meanwhile."""
    try:
        return {f.relative_to(checkpoint).as_posix(): f.stat().st_size for f in files(checkpoint)}
    except FileNotFoundError:
        return {}
