# SPDX-License-Identifier: Apache-2.0
"""Features of the frames of videos, one file per video: a file that is there is done."""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jaxtyping import Float32

from m2jax import bundle as bundle_lib
from m2jax.bundle import Bundle
from m2jax.config import UserError
from m2jax.dist.mesh import local_mesh
from m2jax.tasks.video import decode

SAMPLE = 64  # values of each parameter that tell models apart
UNIT = 1e-3  # features are unit rows to so much

T = TypeVar("T")


class Identity(NamedTuple):
    """Which model features are of."""

    model: str  # its architecture and the name of its checkpoint
    fingerprint: str  # of its parameters and preprocessing


class Encoder:
    """An image tower on the mesh of this process's devices, fed in batches of one shape."""

    def __init__(self, model: str, batch: int = 64) -> None:
        self.bundle = bundle_lib.load(model, mesh=local_mesh())
        self.identity = identity(self.bundle, Path(model).name, bundle_lib.resolved(model))
        self.batch = batch

    def video(self, path: Path, rate: float) -> Float32[np.ndarray, "frames dim"]:
        """Features of a video's frames, decoded while others are encoded.

        Raises:
            UserError: the video cannot be read, or the model gives no finite features for it.
        """
        squares = (self.bundle.preprocessing.square(image) for image in decode.frames(path, rate))
        found = [self._encode(batch) for batch in _batches(_ahead(squares, self.batch), self.batch)]
        features = np.concatenate(found)
        if not np.isfinite(features).all():
            row = int(np.flatnonzero(~np.isfinite(features).all(axis=1))[0])
            raise UserError(
                f"{path}: the model gives no finite features for frame {row}: use another model or "
                "leave the video out"
            )
        return features

    def _encode(self, squares: Sequence[Any]) -> np.ndarray:
        pixels = np.stack([np.asarray(square, np.float32) / 255 for square in squares])
        rows = np.arange(self.batch) % len(pixels)  # one shape: compiled once
        return np.asarray(self.bundle.encode_image(pixels[rows]), np.float32)[: len(pixels)]


def identity(bundle: Bundle, name: str, checkpoint: str = "") -> Identity:
    """What tells a model from others: names, and some values of each parameter.

    Args:
        bundle: the model.
        name: of its folder.
        checkpoint: of it, where it has several.
    """
    digest = hashlib.sha256(repr((bundle.config.name, bundle.preprocessing)).encode())
    for path, value in jax.tree_util.tree_leaves_with_path(bundle.params):  # keys in order
        key, flat = jax.tree_util.keystr(path), value.reshape(-1)
        few = flat[:: max(1, flat.size // SAMPLE)]
        digest.update(repr((key, value.shape, str(value.dtype))).encode())
        digest.update(np.ascontiguousarray(np.asarray(few, np.float32)).tobytes())
    label = " ".join(dict.fromkeys(filter(None, (bundle.config.name, name, checkpoint))))
    return Identity(label, digest.hexdigest()[:16])


def write(path: Path, features: Float32[np.ndarray, "frames dim"]) -> None:
    """Writes the features of a video, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp.npy")
    np.save(temporary, features)
    temporary.replace(path)


def _batches(items: Iterator[T], size: int) -> Iterator[list[T]]:
    batch: list[T] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _ahead(items: Iterator[T], size: int) -> Iterator[T]:
    """The items, made ahead in a thread; an error comes where its item would."""
    done = object()
    ready: queue.Queue[Any] = queue.Queue(maxsize=size)
    left = threading.Event()

    def put(value: object) -> None:
        while not left.is_set():
            try:
                return ready.put(value, timeout=0.2)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put((item, None))
                if left.is_set():
                    return
            put((done, None))
        except BaseException as error:
            put((done, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is done:
                return
            yield item
    finally:
        left.set()
        thread.join()


def find_videos(paths: Sequence[Path], flag: str) -> dict[str, Path]:
    """Video files by name: those given, and for folders those below them by their path there.

    Raises:
        UserError: a path does not exist, a folder holds no video, or two have one name.
    """
    found: dict[str, Path] = {}
    for path in paths:
        if not path.exists():
            raise UserError(f"{flag} {path}: no such file: check the path")
        inside = [(path.name, path)]
        if path.is_dir():
            files = (p for p in path.rglob("*") if p.suffix.lower() in decode.SUFFIXES)
            inside = [(p.relative_to(path).as_posix(), p) for p in sorted(files) if p.is_file()]
            if not inside:
                raise UserError(f"{flag} {path}: holds no video: name a folder with videos")
        for name, file in inside:
            if name in found:
                raise UserError(f"{flag} {file}: a second {name}: rename it, or leave it out")
            found[name] = file
    return found


Say = Callable[[str], None]
