# SPDX-License-Identifier: Apache-2.0
"""What may be shown on a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    """One line without codes that a terminal obeys: names out of a hostile file may hold both."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
