# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints of a run stay: the newest, milestones, and the best by a logged metric."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from orbax.checkpoint import checkpoint_managers

from m2jax.config import Checkpoint, UserError


def retention(cfg: Checkpoint) -> dict[str, Any]:
    """Orbax's options for a config: ``preservation_policy`` and what it chooses the best by.

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
    options: dict[str, Any] = {}
    if cfg.best:

        def score(metrics: Mapping[str, float]) -> float:
            return goodness(cfg.best, metrics)

        policies.append(
            checkpoint_managers.BestN(
                get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False
            )
        )
        options["best_fn"] = score
    return {"preservation_policy": checkpoint_managers.AnyPreservationPolicy(policies), **options}


def goodness(best: str, metrics: Mapping[str, float]) -> float:
    """What ``checkpoint.best`` maximises: the metric, negated after a ``-``; NaN is the worst.

    Raises:
        UserError: the run logs no such metric.
    """
    name = best.removeprefix("-")
    if name not in metrics:
        raise UserError(
            f"checkpoint.best={best!r}: no such metric: use one of {', '.join(sorted(metrics))}, "
            "with - before it where less is better"
        )
    value = -metrics[name] if best.startswith("-") else metrics[name]
    return -math.inf if math.isnan(value) else value
