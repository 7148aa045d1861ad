# SPDX-License-Identifier: Apache-2.0
"""Work directories on object stores (``s3://``, ``gs://``, what fsspec knows): a mirrored copy.

A run lives in a local folder, the staging folder, and a thread copies to the store what is complete
there. Neither store nor library is trusted to make many objects appear at once: the files of a
checkpoint go first, then ``complete.json``, which lists them with their sizes. A checkpoint without
it does not exist. Orbax itself writes to ``gs://`` but not to ``s3://``, and object stores cannot
append to ``metrics.jsonl``; one way for all is simpler than two.
"""

from __future__ import annotations

import contextlib
import json
import os
import posixpath
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from m2jax.config import UserError

MARKER = "complete.json"
CHECKPOINTS = "checkpoints"
EXTRAS = {"s3": "m2jax[s3]", "gs": "m2jax[gcs]", "gcs": "m2jax[gcs]"}


def is_remote(path: object) -> bool:
    """Whether a path is an address on a store."""
    return "://" in str(path)


class Store:
    """A folder on an object store.

    Args:
        url: such as ``s3://bucket/runs/a``.

    Raises:
        UserError: no such protocol, or its package is not installed.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url.rstrip("/")
        protocol = url.partition("://")[0]
        try:
            # Listings are never cached: another process may write here.
            self.fs, self._root = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
        except ImportError as error:
            extra = EXTRAS.get(protocol, f"the fsspec package for {protocol}://")
            raise UserError(f"{url}: {error}: install {extra}") from error
        except ValueError as error:
            raise UserError(f"{url}: {error}: use a path, s3://... or gs://...") from error

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

    def steps(self) -> list[int]:
        """Steps whose checkpoint is complete, in order."""
        return [step for step in self.folders() if self.read(CHECKPOINTS, str(step), MARKER)]

    def folders(self) -> list[int]:
        """Steps of which there is anything, in order."""
        try:
            names = self.fs.ls(self.path(CHECKPOINTS), detail=False)
        except FileNotFoundError:
            return []
        found = (posixpath.basename(name.rstrip("/")) for name in names)
        return sorted(int(name) for name in found if name.isdigit())

    def remove(self, step: int) -> None:
        """Removes a checkpoint, its marker first: what is half gone is no checkpoint."""
        marker = self.path(CHECKPOINTS, str(step), MARKER)
        if self.fs.exists(marker):
            self.fs.rm_file(marker)
        self.fs.rm(self.path(CHECKPOINTS, str(step)), recursive=True)

    def push(self, checkpoint: Path) -> None:
        """Copies one complete local checkpoint there, its marker last."""
        sizes = {}
        for file in files(checkpoint):
            name = file.relative_to(checkpoint).as_posix()
            sizes[name] = file.stat().st_size
            self.put(file, CHECKPOINTS, checkpoint.name, name)
        marker = json.dumps({"files": sizes}).encode()
        self.fs.pipe_file(self.path(CHECKPOINTS, checkpoint.name, MARKER), marker)

    def pull(self, step: int, checkpoints: Path) -> Path:
        """Copies one complete checkpoint here; it appears in ``checkpoints`` whole or not at all.

        Raises:
            UserError: a file is missing there, or is not as long as its marker says.
        """
        marker = self.read(CHECKPOINTS, str(step), MARKER)
        temporary, final = checkpoints / f"{step}.pulled-tmp", checkpoints / str(step)
        for name, size in json.loads(marker or b'{"files": {}}')["files"].items():
            parts = name.split("/")
            if posixpath.isabs(name) or not {"", ".", ".."}.isdisjoint(parts):
                raise UserError(
                    f"{self.url}: {MARKER} of step {step} names {name!r}, which lies outside of "
                    "the checkpoint: remove the checkpoint"
                )
            local = temporary.joinpath(*parts)
            local.parent.mkdir(parents=True, exist_ok=True)
            source = self.path(CHECKPOINTS, str(step), name)
            try:
                self.fs.get_file(source, str(local))
            except FileNotFoundError:
                raise UserError(
                    f"{source}: missing: remove the checkpoint to use another"
                ) from None
            if local.stat().st_size != size:
                raise UserError(
                    f"{source}: {local.stat().st_size} bytes, not {size}: remove the checkpoint to "
                    "use another"
                )
        temporary.replace(final)
        return final


def files(folder: Path) -> Iterator[Path]:
    """Every file below a folder, in an order that does not change."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


class Mirror:
    """Keeps a store equal to a local work directory while a run goes on.

    ``with Mirror(store, directory): ...``; leaving the block copies what is left and raises if that
    fails. Failures in between are tried again: the next pass does all that is missing.

    Args:
        store: where to.
        directory: the local work directory.
        every_s: seconds between passes.
    """

    def __init__(self, store: Store, directory: Path, *, every_s: float = 10.0) -> None:
        self._store, self._directory, self._every_s = store, directory, every_s
        self._seen: dict[Path, tuple[int, float]] = {}
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._passes, name="m2jax-mirror", daemon=True)

    def __enter__(self) -> Mirror:
        self.sync()  # a store that cannot be written to is found before the first step
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._left.set()
        self._thread.join()
        self.sync()

    def _passes(self) -> None:
        while not self._left.wait(self._every_s):
            try:
                self.sync()
            except UserError as error:
                print(f"warning: {error}", file=sys.stderr, flush=True)

    def sync(self) -> None:
        """One pass: complete checkpoints, then changed files, then what is no longer kept.

        Raises:
            UserError: the store did not take something.
        """
        try:
            self._checkpoints()
            self._files()
        except Exception as error:  # each store has errors of its own
            raise UserError(
                f"{self._store.url}: could not be written ({error}): check the address and your "
                f"rights; everything is still in {self._directory}"
            ) from error

    def _checkpoints(self) -> None:
        folder = self._directory / CHECKPOINTS
        here = sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit())
        there = set(self._store.steps())
        for step in here:
            if step not in there:
                self._store.push(folder / str(step))
        for step in self._store.folders():
            if step not in here:
                self._store.remove(step)

    def _files(self) -> None:
        for file in files(self._directory):
            name = file.relative_to(self._directory)
            inside = name.parts[0] == CHECKPOINTS and len(name.parts) > 2  # of a checkpoint
            if inside or file.suffix == ".tmp":
                continue
            status = file.stat()
            stamp = status.st_size, status.st_mtime
            if self._seen.get(name) != stamp:
                self._store.put(file, name.as_posix())
                self._seen[name] = stamp


def staging(url: str) -> Path:
    """The local folder of a remote one, below ``$M2JAX_STAGING`` or the user's cache."""
    root = os.environ.get("M2JAX_STAGING") or "~/.cache/m2jax/staging"
    return Path(root).expanduser() / re.sub(r"[^\w.-]+", "_", url)


@contextlib.contextmanager
def mirrored(url: str) -> Iterator[Path]:
    """The local folder of a remote work directory, as the store has it now; mirrored in the block.

    What an earlier run staged here and could not copy any more is kept and copied now, unless the
    store holds nothing of the run: then somebody removed it there, and it begins anew. What was
    staged is set aside, never removed: it may be all there is.

    Raises:
        UserError: the store cannot be read or written.
    """
    store, directory = Store(url), staging(url)
    if directory.exists() and store.read("config.json") is None:
        aside = directory.with_name(f"{directory.name}.aside-{time.time_ns()}")
        directory.rename(aside)
        print(
            f"warning: {url} holds no run any more: what was staged is in {aside}", file=sys.stderr
        )
    (directory / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "metrics.jsonl"):
        contents = store.read(name)
        if contents is not None and not (directory / name).exists():
            (directory / name).write_bytes(contents)
    download(store, directory)
    with Mirror(store, directory):
        yield directory


def fetched(url: str) -> Path:
    """A local copy of a remote work directory with its newest complete checkpoint, to load from.

    Raises:
        UserError: the store cannot be read, or holds no complete checkpoint there.
    """
    store, directory = Store(url), staging(url)
    if not store.steps():
        raise UserError(f"{url}: holds no complete checkpoint: train into it or name another")
    download(store, directory)
    return directory


def download(store: Store, directory: Path) -> None:
    """Brings the newest complete checkpoint of a store here, unless it or a newer one is."""
    folder = directory / CHECKPOINTS
    here = [int(p.name) for p in folder.glob("*") if p.name.isdigit()]
    newest = max(store.steps(), default=-1)
    if newest > max(here, default=-1):
        folder.mkdir(parents=True, exist_ok=True)
        store.pull(newest, folder)
