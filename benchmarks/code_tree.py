# SPDX-License-Identifier: Apache-2.0
"""Names the code a benchmark ran, so that a row is made again when the code has changed."""

import hashlib
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def tree():
    """Git's hash of ``m2jax/``, and of what is changed there and not committed."""
    git = ["git", "-C", str(ROOT)]
    made = subprocess.run(
        [*git, "rev-parse", "--short=10", "HEAD:m2jax"], capture_output=True, check=True
    )
    changes = subprocess.run([*git, "diff", "HEAD", "--", "m2jax"], capture_output=True, check=True)
    mark = f"+{hashlib.sha256(changes.stdout).hexdigest()[:6]}" if changes.stdout else ""
    return made.stdout.decode().strip() + mark
