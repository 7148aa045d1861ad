# SPDX-License-Identifier: Apache-2.0
"""Which differences between two evaluations are real.

Where both keep the examples of a figure, the same resamples are drawn for both (paired bootstrap,
Efron and Tibshirani 1993, chapter 16): what is hard for both models cancels. Else the two intervals
are taken as normal and independent, which sees less. With many figures some differ by chance: the
p-values are corrected by Holm's method (1979), which holds however they depend on each other.
"""

from __future__ import annotations

import itertools
import json
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from m2jax.config import UserError
from m2jax.eval import figures
from m2jax.eval import metrics as metrics_lib

RESAMPLES = 10_000  # the smallest p-value is 2 in as many
PER_FIGURE = 100  # and as many more as figures, else none of very many could be told from chance
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
    flat = isinstance(found, dict) and all(isinstance(v, int | float) for v in found.values())
    if not flat or not found:
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
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            rows = {key: file[key] for key in file.files}
            questions = str(rows.pop(QUESTIONS, ""))
            return {k: v for k, v in rows.items() if v.ndim == 3 and v.shape[2] == 2}, questions
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: damaged ({error}): remove it, or evaluate again") from error


def compare(a: Saved, b: Saved, *, resamples: int = 0) -> list[Difference]:
    """Differences of every figure that both have and that chance has a part in.

    Args:
        a: an evaluation.
        b: another, on the same suite.
        resamples: of each figure; 0: enough for the number of figures.

    Raises:
        UserError: they have no figure in common.
    """
    alike = a.questions == b.questions  # of other data the examples are no pairs
    common = a.metrics.keys() & b.metrics.keys()
    keys = [k for k in a.metrics if not k.startswith("baseline/") and {k, f"{k}_low"} <= common]
    if not keys:
        raise UserError("compare: the files have no figure in common: evaluate the same suite")
    pairs = {
        key: (a.examples[key], b.examples[key])
        for key in keys
        if alike and key in a.examples and key in b.examples
        if a.examples[key].shape == b.examples[key].shape
    }
    told = _paired(pairs, resamples or max(RESAMPLES, PER_FIGURE * len(keys)))
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


def _paired(pairs: Mapping[str, tuple[np.ndarray, np.ndarray]], resamples: int) -> dict[str, _Told]:
    """Figures over as many examples are drawn together: drawing is what takes the time."""
    sizes: dict[int, list[str]] = {}
    for key, (first, _) in pairs.items():
        sizes.setdefault(len(first), []).append(key)
    found = {}
    for total, keys in sizes.items():
        # [examples, a | b, numerator | denominator of each ratio], figure beside figure
        parts = [np.stack(pairs[key], axis=1).reshape(total, -1) for key in keys]
        ends = np.cumsum([0, *(part.shape[1] for part in parts)])
        table = np.concatenate(parts, axis=1).astype(np.float64)

        def differences(
            times: np.ndarray, table: np.ndarray = table, ends: np.ndarray = ends
        ) -> np.ndarray:
            sums = times @ table
            each = [
                figures.ratio_mean(sums[:, i:j].reshape(len(times), 2, -1, 2))
                for i, j in itertools.pairwise(ends)
            ]
            return np.stack([values[:, 1] - values[:, 0] for values in each], axis=-1)

        drawn = metrics_lib.resampled([total], differences, resamples=resamples)
        for key, column in zip(keys, drawn.T, strict=True):
            low, high = np.quantile(column, [0.025, 0.975])
            tail = min((column <= 0).sum(), (column >= 0).sum())
            p = min(1.0, 2 * (int(tail) + 1) / (resamples + 1))
            found[key] = _Told(float(low), float(high), p)
    return found


def _unpaired(a: Mapping[str, float], b: Mapping[str, float], key: str) -> _Told:
    spread = [(each[f"{key}_high"] - each[f"{key}_low"]) / 2 for each in (a, b)]
    half, gap = math.hypot(*spread), b[key] - a[key]
    if half == 0:
        return _Told(gap, gap, 1.0 if gap == 0 else 0.0)
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
