# SPDX-License-Identifier: Apache-2.0
"""Work directories on object stores (``s3://``, ``gs://``, what fsspec knows): a mirrored copy.

A run lives in a local folder, the staging folder, and a thread copies to the store what is complete
there (``store.py``). Orbax itself writes to ``gs://`` but not to ``s3://``, and object stores
cannot append to ``metrics.jsonl``; one way for all is simpler than two.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import re
import shutil
import sys
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from m2jax.checkpoint.retention import SCORES
from m2jax.checkpoint.store import CHECKPOINTS, IncompleteError, Store, files
from m2jax.config import UserError
from m2jax.data import stores

COPIED = ".copied"  # markers of the checkpoints that the store had or has, as STEP; stays here
LOGS = (
    *("config.json", "metrics.jsonl", "goodput.jsonl", "origin.json"),
    *(f"{CHECKPOINTS}/best", f"{CHECKPOINTS}/{SCORES}"),
)
LEFT_AFTER_S = 86400.0  # a copy this old has no process any more that would end it


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
        self._had: set[int] = set()  # steps that were here at some time
        self._spared: set[int] = set()  # of them those that stay there although they went here
        self._warned: set[int] = set()
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
        """One pass: changed files, then complete checkpoints, then what is no longer kept here.

        In that order the rows of a run are never behind a checkpoint that it may go on from.

        Raises:
            UserError: the store did not take something.
        """
        try:
            here = steps_in(self._directory)
            self._files()
            self._checkpoints(here)
        except Exception as error:  # each store has errors of its own
            raise UserError(
                f"{self._store.url}: could not be written ({error}): check the address and your "
                f"rights; everything is still in {self._directory}"
            ) from error

    def _checkpoints(self, here: list[int]) -> None:
        self._had.update(here)
        for step in reversed(here):  # the newest first: it is what a run goes on from
            marker = noted(self._directory, step)
            if marker is None or marker != self._store.marker(step):
                self._push(step)
        # Others are not this machine's to remove: it may have begun with the newest alone.
        gone = self._had.difference(here, self._spared)
        for step in gone.intersection(self._store.folders()):
            self._store.remove(step)

    def _push(self, step: int) -> None:
        folder = self._directory / CHECKPOINTS / str(step)
        sent = self.sent(folder)
        if sent is not None:
            note(self._directory, step, self._store.mark(step, sent))

    def sent(self, folder: Path) -> dict[str, int] | None:
        """Copies a checkpoint, still without a marker; ``None`` where it is no complete one."""
        step = int(folder.name)
        try:
            return self._store.send(folder)
        except IncompleteError as error:
            if folder.exists() and step not in self._warned:
                print(f"warning: {error}", file=sys.stderr, flush=True)
                self._warned.add(step)
            return None

    def _files(self) -> None:
        for file in files(self._directory):
            name = file.relative_to(self._directory)
            top, *below = name.parts
            inside = top == CHECKPOINTS and len(below) > 1  # of a checkpoint
            if inside or top == COPIED or file.suffix == ".tmp":
                continue
            self._put(file)

    def _put(self, file: Path) -> None:
        """Copies one file of the run, if it has changed."""
        name, status = file.relative_to(self._directory), file.stat()
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
    run went on elsewhere, or was removed or replaced there. What was staged is set aside then,
    never removed: it may be all there is. Checkpoints there that this machine never had stay.

    Raises:
        UserError: the store cannot be read or written.
    """
    store, directory = Store(url), staging(url)
    reason = _outdated(store, directory)
    if reason and any(files(directory)):
        aside = _aside(directory)
        directory.rename(aside)
        print(f"warning: {url} {reason}: what was staged is in {aside}", file=sys.stderr)
    (directory / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    take_logs(store, directory)
    steps = store.steps()
    if max(steps, default=-1) > max(steps_in(directory), default=-1):
        download(store, directory, steps)
    _take_best(store, directory, steps)
    with Mirror(store, directory):
        yield directory


def fetched(url: str) -> Path:
    """A local copy of what lies at an address, to load from.

    That is a work directory (its newest complete checkpoint is copied), one of its checkpoints, or
    a model folder.

    Raises:
        UserError: the store cannot be read, or holds no complete checkpoint there.
    """
    parent, name = posixpath.split(url.rstrip("/"))
    if name.isdigit() and posixpath.basename(parent) == CHECKPOINTS:
        url, asked = posixpath.dirname(parent), {int(name)}
    else:
        asked = None
    store, directory = Store(url), staging(url)
    names = store.names()
    if CHECKPOINTS not in names and names.difference(LOGS):
        return stores.matching([url], "model")[0]
    steps = [step for step in store.steps() if asked is None or step in asked]
    if not steps:
        what = "holds no complete checkpoint" if asked is None else f"has no complete step {name}"
        raise UserError(f"{url}: {what}: train into it or name another")
    return directory / CHECKPOINTS / str(download(store, directory, steps))


def download(store: Store, directory: Path, steps: Collection[int]) -> int:
    """Brings the newest complete checkpoint of a store here, unless it is.

    One that turns out to be damaged there costs the steps since the one before it.

    Args:
        store: where from.
        directory: the local work directory.
        steps: those that are complete there.

    Returns:
        Its step.

    Raises:
        UserError: all are; the line is that of the newest.
    """
    _clear(directory / CHECKPOINTS)
    damaged: dict[int, UserError] = {}
    for step in sorted(steps, reverse=True):
        try:
            _bring(store, directory, step)
        except UserError as error:
            damaged[step] = error
            continue
        for error in damaged.values():
            print(f"warning: {error}; step {step} is used", file=sys.stderr, flush=True)
        return step
    raise damaged[max(damaged)]


def _bring(store: Store, directory: Path, step: int) -> None:
    """One checkpoint, unless the copy here is of what is there now."""
    folder = directory / CHECKPOINTS
    folder.mkdir(parents=True, exist_ok=True)
    marker, here, local = store.marker(step), noted(directory, step), folder / str(step)
    if local.exists():
        if here in (None, marker):  # None: a run made it here
            return
        old = local.rename(folder / f"{step}.pulled-old-{time.time_ns()}")
        shutil.rmtree(old)
    # Noted first: what is here without a note was made here. Nobody takes a note for a copy.
    note(directory, step, marker or b"")
    try:
        store.pull(step, folder)
    except BaseException:
        forget(directory, step)
        raise


def _outdated(store: Store, directory: Path) -> str:
    """Why what is staged is not what the run goes on from; "" where it is."""
    if not directory.exists():
        return ""
    if store.read("config.json") is None:
        return "holds no run any more"
    here = max(steps_in(directory), default=-1)
    if max(store.steps(), default=-1) > here:
        return "went on elsewhere"
    if noted(directory, here) not in (None, store.marker(here)):
        return f"holds another step {here}, or none any more"
    return ""


def take_logs(store: Store, directory: Path) -> None:
    """Files of the run as the store has them, unless those here go further."""
    ahead = max(steps_in(directory), default=-1) > max(store.steps(), default=-1)
    aside = _aside(directory)
    for name in LOGS:
        contents, local = store.read(*name.split("/")), directory / name
        if contents is None:
            continue
        if local.exists():
            if ahead or local.read_bytes().startswith(contents):
                continue
            aside.mkdir(exist_ok=True)
            local.replace(aside / local.name)
            print(f"warning: {local}: {store.url} has another: it is in {aside}", file=sys.stderr)
        _write(local, contents)


def _take_best(store: Store, directory: Path, steps: Collection[int]) -> None:
    """The best checkpoint too: what comes is compared with it, and it stays while it is."""
    tag = directory / CHECKPOINTS / "best"
    text = tag.read_text(errors="replace").strip() if tag.exists() else ""
    if not (text.isascii() and text.isdigit()) or int(text) not in steps:
        return
    try:
        _bring(store, directory, int(text))
    except UserError as error:
        print(f"warning: {error}; the run goes on without its best", file=sys.stderr, flush=True)


def steps_in(directory: Path) -> list[int]:
    """Steps of the checkpoints of a local work directory, in order."""
    names = (path.name for path in (directory / CHECKPOINTS).glob("*"))
    return sorted(int(name) for name in names if name.isdigit())


def _aside(directory: Path) -> Path:
    """Where to set aside what a staging folder holds; another one each time."""
    return directory.with_name(f"{directory.name}.aside-{time.time_ns()}")


def note(directory: Path, step: int, marker: bytes) -> None:
    """Keeps the marker of a checkpoint that is here and there."""
    (directory / COPIED).mkdir(parents=True, exist_ok=True)
    _write(directory / COPIED / str(step), marker)


def noted(directory: Path, step: int) -> bytes | None:
    """That marker; ``None`` where a run made the checkpoint here and it was not copied yet."""
    try:
        return (directory / COPIED / str(step)).read_bytes()
    except FileNotFoundError:
        return None


def forget(directory: Path, step: int) -> None:
    """Takes the note of a checkpoint back."""
    (directory / COPIED / str(step)).unlink(missing_ok=True)


def _write(file: Path, contents: bytes) -> None:
    temporary = file.with_name(f"{file.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    temporary.write_bytes(contents)
    temporary.replace(file)


def _clear(checkpoints: Path) -> None:
    """Removes what killed processes left half-copied, a day later."""
    for left in checkpoints.glob("*.pulled-*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > LEFT_AFTER_S:
                shutil.rmtree(left, ignore_errors=True)
