# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints of a run stay: the newest, milestones, and the best by a figure of the run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from m2jax.config import Checkpoint, UserError

SCORES = "scores.json"  # beside the checkpoints: how good each is by checkpoint.best


class Best:
    """How good checkpoints are by ``checkpoint.best``; a policy of Orbax's that keeps the best one.

    The figure may be known with the save (a metric of the training step) or later (an evaluation of
    the checkpoint), and outlives the process in ``scores.json``.

    Args:
        name: the figure; with ``-`` before it, less is better.
        folder: of the checkpoints.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self._name, self._file = name, folder / SCORES
        self._scores = _read(self._file)

    def note(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures of one checkpoint; those of the first process count.

        Raises:
            UserError: what ``checkpoint.best`` names is not among them.
        """
        score = goodness(self._name, figures)
        known = multihost_utils.broadcast_one_to_all(np.float32(score))
        if math.isnan(known):  # in every process, or some would wait for the others
            raise unknown(self._name, figures)
        self._scores[step] = float(known)
        if jax.process_index() == 0:
            temporary = self._file.with_suffix(".tmp")
            temporary.write_text(json.dumps(self._scores), encoding="utf-8")
            temporary.replace(self._file)

    def of(self, steps: Iterable[int]) -> int | None:
        """The best of these; ``None`` where no figure of any is known."""
        known = [step for step in steps if step in self._scores]
        return max(known, key=lambda step: (self._scores[step], step), default=None)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Orbax's question: which of these stay."""
        del context
        best = self.of(one.step for one in checkpoints)
        return [one.step == best for one in checkpoints]


def retention(cfg: Checkpoint, best: Best | None = None) -> checkpoint_managers.PreservationPolicy:
    """Orbax's policy for a config.

    Raises:
        UserError: a number out of range.
    """
    for key, least in (("every", 1), ("keep", 1), ("keep_every", 0)):
        value = getattr(cfg, key)
        if value < least:
            raise UserError(f"checkpoint.{key}={value}: must be at least {least}: mend it")
    policies: list[Any] = [checkpoint_managers.LatestN(cfg.keep)]
    if cfg.keep_every:
        policies.append(checkpoint_managers.EveryNSteps(cfg.keep_every))
    if best is not None:
        policies.append(best)
    return checkpoint_managers.AnyPreservationPolicy(policies)


def goodness(best: str, figures: Mapping[str, float]) -> float:
    """What ``checkpoint.best`` maximises: the figure, negated after a ``-``; NaN if it is missing.

    A figure that is NaN is the worst.
    """
    name = best.removeprefix("-")
    if name not in figures:
        return math.nan
    value = -figures[name] if best.startswith("-") else figures[name]
    return -math.inf if math.isnan(value) else float(value)


def unknown(best: str, figures: Iterable[str]) -> UserError:
    """The line for a ``checkpoint.best`` that names no figure of the run."""
    return UserError(
        f"checkpoint.best={best!r}: no such figure: use one of {', '.join(sorted(figures))}, with "
        "- before it where less is better (figures of eval.suite need eval.every)"
    )


def _read(file: Path) -> dict[int, float]:
    """Scores of an earlier process; none where there is no such file."""
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {int(step): float(score) for step, score in found.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: damaged ({error}): remove it to forget the best") from error
