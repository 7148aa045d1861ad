# SPDX-License-Identifier: Apache-2.0
"""Embeddings before and after a conversion, side by side."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from m2jax.config import UserError
from m2jax.data.text import Tokenizer, Tokens

LIMIT = 2e-5  # largest absolute difference of features that float32 arithmetic explains


TEXTS = ("皮卡丘", "a photo of a cat", "一张猫的照片, in English too", "")


def pictures(side: int) -> dict[str, Float[np.ndarray, "side side 3"]]:
    """Generated pictures, in [0, 1]: what differs along each axis, and what differs everywhere."""
    ramp = np.linspace(0, 1, side, dtype=np.float32)
    gradient = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], 1 - ramp[:, None]), -1)
    bars = (np.arange(side) // 5 % 2).astype(np.float32)[:, None, None]
    noise = np.random.default_rng(0).uniform(size=gradient.shape).astype(np.float32)
    return {"gradient": gradient, "stripes": np.broadcast_to(bars, noise.shape), "noise": noise}


def texts(vocab_size: int, length: int, tokenizer: Tokenizer | None) -> Tokens:
    """Random ids of several lengths, and ``TEXTS`` where there is a tokenizer, to its length."""
    tokens = None if tokenizer is None else tokenizer(TEXTS)
    length = length if tokens is None else tokens.ids.shape[1]
    ids = np.random.default_rng(1).integers(0, vocab_size, (3, length)).astype(np.int32)
    mask = np.arange(length) < np.array([[length], [max(1, length // 2)], [2]])
    if tokens is not None:
        ids, mask = np.concatenate([ids, tokens.ids]), np.concatenate([mask, tokens.mask])
    return Tokens(ids, mask)


@contextlib.contextmanager
def every_tensor_there() -> Iterator[None]:
    """Says what to do where the reference asks for a tensor that was allowed to be missing."""
    try:
        yield
    except KeyError as error:
        raise UserError(
            f"{error.args[0]}: the check needs it, and it was allowed to be missing: add --no-check"
        ) from None


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
