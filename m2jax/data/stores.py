# SPDX-License-Identifier: Apache-2.0
"""Files that a user names by paths and patterns, here or on an object store (fsspec).

Readers seek in local files, so what lies on a store is copied to this machine once, each file under
an address that its contents there decide: a changed one is another file. For sets larger than the
disk, mount the bucket (gcsfuse, mountpoint-s3) and name the mount.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import os
import posixpath
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from m2jax.config import UserError
from m2jax.data.home import data_home

EXTRAS = {"s3": "m2jax[s3]", "gs": "m2jax[gcs]", "gcs": "m2jax[gcs]"}


def is_remote(path: object) -> bool:
    """Whether a path is an address on a store."""
    return "://" in str(path)


def opened(url: str) -> tuple[Any, str]:
    """The file system of an address, and the path on it. Listings are never cached.

    Raises:
        UserError: no such protocol, or its package is not installed.
    """
    import fsspec

    try:  # another process may write here while this one looks
        return fsspec.core.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        protocol = url.partition("://")[0]
        extra = EXTRAS.get(protocol, f"the fsspec package for {protocol}://")
        raise UserError(f"{url}: {error}: install {extra}") from error
    except ValueError as error:
        raise UserError(f"{url}: {error}: use a path, s3://... or gs://...") from error


def matching(patterns: Sequence[str], flag: str, cache: Path | None = None) -> list[Path]:
    """What paths and patterns name, each pattern's sorted; from a store it is copied here first.

    Args:
        patterns: paths, globs, or addresses of files, of folders, or with ``*``.
        flag: the setting that names them, for messages.
        cache: the folder for copies; ``None``: below m2jax's data.

    Raises:
        UserError: one names nothing, or a store cannot be read.
    """
    files: list[Path] = []
    for pattern in patterns:
        if is_remote(pattern):
            files += _copied(pattern, flag, cache or data_home() / "fetched")
            continue
        matched = sorted(glob.glob(str(Path(pattern).expanduser())))
        if not matched:
            raise UserError(f"{flag}: {pattern!r} matches no file: mend the path")
        files += map(Path, matched)
    return files


def _copied(url: str, flag: str, cache: Path) -> list[Path]:
    """Local copies of what an address names."""
    store, path = opened(url)
    try:
        found = sorted(store.glob(path)) if glob.has_magic(path) else [path.rstrip("/")]
        listed = [(one, _listing(store, one)) for one in found]
        if not listed or not all(files for _, files in listed):
            raise UserError(f"{flag}: {url!r} matches no file: mend the address")
        return [_fetch(store, one, files, cache, url) for one, files in listed]
    except UserError:
        raise
    except Exception as error:  # each store has errors of its own
        reason = str(error).split("\n")[0]
        raise UserError(
            f"{flag}: {url}: could not be read ({type(error).__name__}: {reason}): check the "
            f"address, your rights, and the space in {cache}"
        ) from error


def _listing(store: Any, path: str) -> dict[str, dict[str, Any]]:
    """What is known of a file, under "", or of each file of a folder, under its path below it."""
    try:
        about = store.info(path)
    except FileNotFoundError:
        return {}
    if about["type"] == "file":
        return {"": about}
    found = store.find(path, detail=True)
    return {posixpath.relpath(name, path): about for name, about in sorted(found.items())}


def _fetch(
    store: Any, path: str, files: Mapping[str, dict[str, Any]], cache: Path, url: str
) -> Path:
    """A file or folder on this machine; copied by the first process that wants it."""
    known = [(path, name, about["size"], _version(about)) for name, about in files.items()]
    folder = cache / hashlib.sha256(repr((store.protocol, known)).encode()).hexdigest()[:24]
    final = folder / posixpath.basename(path)
    if final.exists():
        return final
    cache.mkdir(parents=True, exist_ok=True)
    with _alone(cache / f"{folder.name}.lock"):
        if final.exists():
            return final
        size = sum(about["size"] for about in files.values())
        print(f"{url}: copying {final.name}, {size / 1e6:,.1f} MB, to {folder}", file=sys.stderr)
        temporary = Path(tempfile.mkdtemp(dir=cache, prefix=f"{folder.name}."))
        try:
            for name, about in files.items():
                _get(store, posixpath.join(path, name) if name else path, about, name, temporary)
            temporary.replace(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return final


def _get(store: Any, source: str, about: dict[str, Any], name: str, folder: Path) -> None:
    """One file of what is fetched into ``folder``, as long as the listing says."""
    base = posixpath.basename(source if not name else source[: -len(name) - 1])
    parts = [base, *name.split("/")] if name else [base]
    if not {"", ".", ".."}.isdisjoint(parts):
        raise UserError(f"{source}: a name that would lie elsewhere here: rename it there")
    local = folder.joinpath(*parts)
    local.parent.mkdir(parents=True, exist_ok=True)
    store.get_file(source, str(local))
    if local.stat().st_size != about["size"]:
        raise UserError(f"{source}: {local.stat().st_size} bytes came, not {about['size']}: again")


def _version(about: Mapping[str, Any]) -> str:
    """What changes with the contents of a file there."""
    keys = ("ETag", "etag", "generation", "md5Hash", "mtime", "LastModified", "created")
    return str(next((about[key] for key in keys if about.get(key)), ""))


@contextlib.contextmanager
def _alone(file: Path) -> Iterator[None]:
    """One process of this machine at a time."""
    handle = os.open(file, os.O_CREAT | os.O_RDWR, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
