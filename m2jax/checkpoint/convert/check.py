# SPDX-License-Identifier: Apache-2.0
"""Embeddings before and after a conversion, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

LIMIT = 2e-5  # largest absolute difference of features that float32 arithmetic explains


class Row(NamedTuple):
    """One kind of embedding over the probe set."""

    probe: str
    max_abs: float
    cosine: float  # the least of all rows
    limit: float  # of max_abs; infinity where the row only informs

    @property
    def passed(self) -> bool:
        """Whether the difference is within the limit; NaN is not."""
        return self.max_abs <= self.limit


class CheckFailed(Exception):
    """The embeddings after a conversion are not those from before it."""

    def __init__(self, rows: Sequence[Row]) -> None:
        worst = max(rows, key=lambda row: np.nan_to_num(row.max_abs - row.limit, nan=np.inf))
        super().__init__(
            f"the check failed: {worst.probe}: {worst.max_abs:.1e} apart, over {worst.limit:.0e}: "
            "nothing was written"
        )
        self.rows = list(rows)


def compare(
    before: Mapping[str, Float[np.ndarray, "rows dim"]],
    after: Mapping[str, Float[np.ndarray, "rows dim"]],
    *,
    limit: float = LIMIT,
) -> list[Row]:
    """One row per kind of embedding that ``before`` has."""
    rows = []
    for probe, old in before.items():
        new = np.asarray(after[probe], np.float64)
        norms = np.linalg.norm(old, axis=-1) * np.linalg.norm(new, axis=-1)
        cosine = ((old * new).sum(-1) / norms).min()
        rows.append(Row(probe, float(np.abs(new - old).max()), float(cosine), limit))
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows as text."""
    lines = [f"{'probe':44} {'max abs':>9} {'cosine':>10}  limit"]
    for row in rows:
        verdict = (
            "-" if row.limit == np.inf else f"{row.limit:.0e} {'ok' if row.passed else 'FAIL'}"
        )
        lines.append(f"{row.probe:44} {row.max_abs:9.1e} {row.cosine:10.7f}  {verdict}")
    return "\n".join(lines)
