# SPDX-License-Identifier: Apache-2.0
"""Names the code a benchmark ran, so that a row is made again when the code has changed."""

import hashlib
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def tree(*parts):
    """Git's hash of files and folders, and of what is changed there and not committed.

    Args:
        parts: paths from the root of the repository; ``m2jax`` where none is given.
    """
    parts = parts or ("m2jax",)
    git = ["git", "-C", str(ROOT)]
    made = subprocess.run(
        [*git, "rev-parse", *(f"HEAD:{part}" for part in parts)], capture_output=True, check=True
    ).stdout.decode()
    names = made.split()
    one = names[0] if len(names) == 1 else hashlib.sha256(made.encode()).hexdigest()
    changes = subprocess.run([*git, "diff", "HEAD", "--", *parts], capture_output=True, check=True)
    mark = f"+{hashlib.sha256(changes.stdout).hexdigest()[:6]}" if changes.stdout else ""
    return one[:10] + mark
