# SPDX-License-Identifier: Apache-2.0
"""Which differences between two evaluations are real.

Where both keep the examples of a figure, they are compared example by example: what is hard for
both models cancels. The p-value is that of the sign-flip permutation test (Fisher 1935, section
21): were the models equal, each example's difference would as soon have the other sign. Of right or
wrong that is McNemar's exact test. The interval is the paired bootstrap's (Efron and Tibshirani
1993, chapter 16), which few differing examples make too narrow: p alone says what is real.

Else the two intervals are taken as normal and independent, which sees less. With many figures some
differ by chance: the p-values are corrected by Holm's method (1979), which holds however they
depend on each other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import scipy.stats
from jaxtyping import Float

from m2jax.config import UserError
from m2jax.data import npz
from m2jax.eval import metrics as metrics_lib

FLIPS = 10_000  # where not all are counted: the smallest p-value is 1 in as many
PER_FIGURE = 100  # and as many more as figures, else none of very many could be told from chance
ALL_FLIPS = 14  # differing examples up to which all 2^14 are counted
DRAWS = 2000  # of the bootstrap's interval
BLOCK = 2**23  # numbers held at once
LEVEL = 0.05  # of all figures together
FILE_BYTES = 2**30
QUESTIONS = "questions"  # beside the figures' examples: what they answer


class Saved(NamedTuple):
    """An evaluation as its files hold it."""

    metrics: dict[str, float]
    examples: dict[str, np.ndarray]
    questions: str = ""  # what they answer, as ``Evaluation`` has it


class Difference(NamedTuple):
    """B minus A, of one figure."""

    key: str
    a: float
    b: float
    low: float  # 95 % interval of the difference alone
    high: float
    p: float  # two-sided, corrected for all figures
    paired: bool

    @property
    def real(self) -> bool:
        """Whether it is told from chance, all figures considered."""
        return self.p < LEVEL


def examples_file(json_file: Path) -> Path:
    """Where the examples of an evaluation lie: ``a.json`` has ``a.examples.npz``."""
    return json_file.with_suffix(".examples.npz")


def read(path: Path) -> Saved:
    """What ``m2jax eval --json`` wrote.

    Raises:
        UserError: it cannot be read, or is something else.
    """
    try:
        if path.stat().st_size > FILE_BYTES:
            raise UserError(f"{path}: over {FILE_BYTES:,} bytes: name a file of m2jax eval --json")
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: check the path") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged JSON ({error}): evaluate again") from error
    flat = isinstance(found, dict) and all(type(v) in (int, float) for v in found.values())
    if not flat or not found or not all(abs(v) < math.inf for v in found.values()):
        raise UserError(f"{path}: not what m2jax eval --json writes: name such a file")
    return Saved(found, *_read_examples(examples_file(path)))


def write_examples(file: IO[bytes], examples: Mapping[str, np.ndarray], questions: str) -> None:
    """Writes what ``read`` looks for in ``examples_file``."""
    arrays: dict[str, Any] = {**examples, QUESTIONS: np.array(questions)}
    np.savez_compressed(file, **arrays)


def _read_examples(path: Path) -> tuple[dict[str, np.ndarray], str]:
    if not path.is_file():
        return {}, ""
    try:
        rows = npz.read(path)
        questions = str(rows.pop(QUESTIONS, ""))
        for key, row in rows.items():
            _check_examples(key, row)
        return rows, questions
    except npz.DAMAGED as error:
        why = npz.reason(error)
        raise UserError(f"{path}: damaged ({why}): remove it, or evaluate again") from error


def _check_examples(key: str, row: Any) -> None:
    """Refuses arrays that no figure can be the ratios of."""
    if not isinstance(row, np.ndarray) or not np.issubdtype(row.dtype, np.floating):
        raise ValueError(f"{key}: no array of numbers")
    if row.ndim != 3 or row.shape[2] != 2 or 0 in row.shape or not np.isfinite(row).all():
        raise ValueError(f"{key}: {row.shape} are no examples, or not all are finite")
    if (row[..., 1] < 0).any() or not (row[..., 1].sum(axis=0) > 0).all():
        raise ValueError(f"{key}: its denominators are below 0, or sum to 0")


def compare(a: Saved, b: Saved, *, resamples: int = 0) -> list[Difference]:
    """Differences of every figure that both have and that chance has a part in.

    Args:
        a: an evaluation.
        b: another, on the same suite.
        resamples: of each figure's signs; 0: enough for the number of figures.

    Raises:
        UserError: they have no figure in common.
    """
    alike = a.questions == b.questions  # of other data the examples are no pairs
    common = a.metrics.keys() & b.metrics.keys()
    keys = [
        key
        for key in a.metrics
        if not key.startswith("baseline/") and {key, f"{key}_low", f"{key}_high"} <= common
    ]
    if not keys:
        raise UserError("compare: the files have no figure in common: evaluate the same suite")
    pairs = {
        key: (a.examples[key], b.examples[key])
        for key in keys
        if alike and key in a.examples and key in b.examples
        if np.array_equal(a.examples[key][..., 1], b.examples[key][..., 1])
    }
    flips = resamples or max(FLIPS, PER_FIGURE * len(keys))
    told = {key: _paired(*pair, flips) for key, pair in pairs.items()}
    told |= {key: _unpaired(a.metrics, b.metrics, key) for key in keys if key not in pairs}
    corrected = holm([told[key].p for key in keys])
    return [
        Difference(key, a.metrics[key], b.metrics[key], *told[key][:2], p, key in pairs)
        for key, p in zip(keys, corrected, strict=True)
    ]


class _Told(NamedTuple):
    """What one figure alone tells of its difference."""

    low: float
    high: float
    p: float


def _paired(a: np.ndarray, b: np.ndarray, flips: int) -> _Told:
    """Of examples [examples, ratios, numerator | denominator], with the same denominators."""
    gained, weights = (b - a)[..., 0].astype(np.float64), b[..., 1].astype(np.float64)
    # The figure is the mean over ratios of sum of numerators / sum of denominators.
    shares = (gained / weights.sum(axis=0)).mean(axis=1)
    low, high = np.quantile(_drawn(gained, weights), [0.025, 0.975])
    return _Told(float(low), float(high), sign_flip(shares, flips=flips))


def _drawn(gained: np.ndarray, weights: np.ndarray) -> Float[np.ndarray, " draws"]:
    """Differences of resampled figures. Equal examples are drawn as one kind: most are equal."""
    count = gained.shape[1]
    kinds, of_kind = np.unique(
        np.concatenate([gained, weights], axis=1), axis=0, return_counts=True
    )
    rng, total = np.random.default_rng(0), len(gained)
    found, size = [], max(1, min(DRAWS, BLOCK // len(kinds)))
    for first in range(0, DRAWS, size):
        times = rng.multinomial(total, of_kind / total, size=min(size, DRAWS - first))
        sums = times.astype(np.float64) @ kinds
        found.append((sums[:, :count] / sums[:, count:]).mean(axis=1))
    return np.concatenate(found)


def sign_flip(differences: Float[np.ndarray, " examples"], *, flips: int = FLIPS) -> float:
    """Two-sided p-value of the sum of differences, each as likely of either sign.

    Exact where the differences are of one size (McNemar's test) or few; else by drawn signs, the
    observed ones counted among them (Phipson and Smyth 2010). Never below 2 / 2^(examples that
    differ), which is what as many can tell at most.

    Args:
        differences: of each example; those of 0 say nothing.
        flips: number of draws.
    """
    largest = np.abs(differences).max(initial=0.0)
    # To parts of the largest: equal differences may have come by other roundings.
    parts = np.round(differences / largest, 9) if largest else np.zeros(0)
    sizes, of_size = np.unique(np.abs(parts[parts != 0]), return_counts=True)
    number = int(of_size.sum())
    if len(sizes) == 0:
        return 1.0
    if len(sizes) == 1:
        return float(scipy.stats.binomtest(int((parts > 0).sum()), number).pvalue)
    seen = abs(parts.sum()) - 1e-6
    if number <= ALL_FLIPS:
        signs = 1 - 2 * (np.arange(2**number)[:, None] >> np.arange(number) & 1)
        return float((np.abs(signs @ parts[parts != 0]) >= seen).mean())
    # Of as many of one size the signs' sum is binomial.
    rng, beyond, block = np.random.default_rng(0), 0, max(1, BLOCK // len(sizes))
    for first in range(0, flips, block):
        shape = min(block, flips - first), len(sizes)
        beyond += int(
            (np.abs((2 * rng.binomial(of_size, 0.5, shape) - of_size) @ sizes) >= seen).sum()
        )
    return max((beyond + 1) / (flips + 1), 2.0 ** (1 - number))


def _unpaired(a: Mapping[str, float], b: Mapping[str, float], key: str) -> _Told:
    spread = [(each[f"{key}_high"] - each[f"{key}_low"]) / 2 for each in (a, b)]
    half, gap = math.hypot(*spread), b[key] - a[key]
    if half == 0:  # neither file says how much chance there is
        return _Told(gap, gap, 1.0)
    p = math.erfc(abs(gap) / half * metrics_lib.Z95 / math.sqrt(2))
    return _Told(gap - half, gap + half, p)


def holm(raw: list[float]) -> list[float]:
    """P-values corrected so that all claims together are wrong with the level's chance at most."""
    found, largest = [0.0] * len(raw), 0.0
    for place, index in enumerate(sorted(range(len(raw)), key=raw.__getitem__)):
        largest = max(largest, min(1.0, raw[index] * (len(raw) - place)))
        found[index] = largest
    return found


def table(differences: list[Difference]) -> str:
    """For people: per cent, real differences marked."""
    width = max(len(d.key) for d in differences) + 1
    lines = [f"{'per cent':{width}}{'A':>8}{'B':>8}{'B - A':>9}{'95 % interval':>18}{'p':>8}"]
    for d in differences:
        span = f"{100 * d.low:+.1f} to {100 * d.high:+.1f}"
        verdict = "real" if d.real else "could be chance"
        lines.append(
            f"{d.key:{width}}{100 * d.a:8.1f}{100 * d.b:8.1f}{100 * (d.b - d.a):+9.1f}{span:>18}"
            f"{d.p:8.3f}  {verdict}{'' if d.paired else ' (not paired)'}"
        )
    return "\n".join(lines)
