# SPDX-License-Identifier: Apache-2.0
"""Optimiser, schedule and masks; every parameter is asserted to belong to exactly one group."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from m2jax.config import Optim
from m2jax.dist.sharding import replicated

DECAYED = "decayed"  # matrices and tables: weight decay
PLAIN = "plain"  # scales, biases, norms, single tokens: no decay
FROZEN = "frozen"  # no objective of the run reads it: no update, no moments


MUON_BETA = 0.95  # momentum of Muon; b1 and b2 stay those of its AdamW part


class Optimizer(NamedTuple):
    """What the step needs to know."""

    transform: optax.GradientTransformation
    schedule: optax.Schedule  # step -> learning rate


_PLAIN_ENDINGS = (
    *("bias", "scale", "cls_token", "cls_tokens", "mask_token", "probe", "language_tags"),
    *("logit_scale", "logit_vl_scale", "logit_bias", "logit_vl_bias"),
    *("elastic", "mean", "var"),  # AdvBCT's boundaries; running statistics, which no rule moves
)
_TABLES = (
    "text_embed",
    "image_positions",
    "text_positions",
    "embed",
    "positions",
    "types",
    "cameras",
)
_MATRICES = ("kernel",)
_PATCHES = (
    "vision_embed.kernel",
    "vision.kernel",
    "tower.kernel",
)  # [p, p, 3, width]: no stack of matrices


def group(name: str) -> str:
    """The group of the parameter with this dotted name.

    Raises:
        KeyError: a name no rule covers (a new kind of parameter must be given a group here).
    """
    last = name.rsplit(".", 1)[-1]
    if last in _MATRICES or last in _TABLES:
        return DECAYED
    if last in _PLAIN_ENDINGS:
        return PLAIN
    raise KeyError(f"parameter {name!r} has no optimiser group: add its ending to m2jax/optim.py")


def _named(function: Callable[[str, Any], Any], tree: Any) -> Any:
    """Maps (dotted name, leaf) over a tree."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(jax.tree_util.keystr(path, simple=True, separator="."), leaf),
        tree,
    )


def groups(params: Any, frozen: Callable[[str], bool] = lambda name: False) -> Any:
    """A tree like ``params`` with each leaf's group.

    Raises:
        KeyError: a parameter no rule covers.
    """

    def of(name: str, _: Any) -> str:
        found = group(name)
        return FROZEN if frozen(name) else found

    return _named(of, params)


def make_optimizer(
    cfg: Optim,
    steps: int,
    *,
    frozen: Callable[[str], bool] = lambda name: False,
    scales: Mapping[str, Any] | None = None,
    schedule: optax.Schedule | None = None,
) -> Optimizer:
    """The transformation of gradients into updates.

    Clipping of the global norm, then the named rule, then decoupled weight decay on the matrices,
    then the schedule. Muon (Jordan 2024) orthogonalises the updates of the hidden matrices and
    leaves tables, scales and biases to AdamW at ``adam_factor`` times the learning rate.

    Args:
        cfg: the knobs.
        steps: length of the run, where the schedule ends.
        frozen: says by dotted name which parameters are left as they are.
        scales: factors on the whole update, decay included, by dotted name: layer-wise learning
            rates. An array broadcasts against its parameter.
        schedule: in the place of the one that ``cfg`` describes.
    """
    schedule = schedule or make_schedule(cfg, steps)
    clip = optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity()
    moving = optax.chain(clip, _rule(cfg, schedule), _scaled(scales))
    return Optimizer(_but_frozen(moving, frozen), schedule)


def _but_frozen(
    moving: optax.GradientTransformation, frozen: Callable[[str], bool]
) -> optax.GradientTransformation:
    """A rule for all parameters but the frozen ones, which have no moments either."""

    def labels(params: Any) -> Any:
        return jax.tree.map(lambda g: FROZEN if g == FROZEN else "moving", groups(params, frozen))

    return optax.partition({"moving": moving, FROZEN: optax.set_to_zero()}, labels)


def make_sgd(
    schedule: optax.Schedule,
    *,
    weight_decay: float,
    momentum: float = 0.9,
    bias_factor: float = 1.0,
    frozen: Callable[[str], bool] = lambda name: False,
) -> Optimizer:
    """SGD as PyTorch has it, which DC-Former and AdvBCT publish with.

    Decay of all parameters, scales and biases too, is added to the gradient before the momentum.

    Args:
        schedule: step -> learning rate.
        weight_decay: of every parameter.
        momentum: share of the old direction that stays; it is not damped.
        bias_factor: learning rate of biases / that of the rest (2 in DC-Former's code).
        frozen: as of ``make_optimizer``.
    """

    def factors(updates: Any, _: Any) -> Any:
        return _named(
            lambda name, leaf: leaf * (bias_factor if name.endswith("bias") else 1.0), updates
        )

    moving = optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.trace(momentum),
        optax.stateless(factors),
        optax.scale_by_learning_rate(schedule),
    )
    return Optimizer(_but_frozen(moving, frozen), schedule)


def transreid_rates(peak: float, epochs: int) -> list[float]:
    """Learning rates of epochs 1 to E of TransReID, which DC-Former takes over.

    Five epochs up from a hundredth of the peak, then half a cosine to 0.002 of it; its phase counts
    from the first epoch, so the warm-up cuts its beginning off.
    """

    def rate(epoch: int) -> float:
        if epoch < 5:
            return 0.01 * peak + epoch * 0.99 * peak / 5
        return 0.002 * peak + 0.5 * 0.998 * peak * (1 + math.cos(math.pi * epoch / epochs))

    return [rate(epoch) for epoch in range(1, epochs + 1)]


def by_epoch(rates: Sequence[float], steps: int) -> optax.Schedule:
    """A schedule that holds a rate for an epoch of so many steps, the last one for good."""
    table = jnp.asarray(rates)

    def schedule(step: Any) -> Any:
        return table[jnp.minimum(step // steps, len(rates) - 1)]

    return schedule


def _scaled(scales: Mapping[str, Any] | None) -> optax.GradientTransformation:
    """Multiplies updates by the factors of their parameters."""
    if scales is None:
        return optax.identity()
    return optax.stateless(
        lambda updates, _: _named(
            lambda name, leaf: leaf * jnp.asarray(scales[name], leaf.dtype), updates
        )
    )


def at_step(opt_state: optax.OptState, step: jax.Array) -> optax.OptState:
    """The state of an optimiser with its schedules at ``step``.

    A schedule counts the updates it has seen. Skipped steps and rewinds would leave it behind the
    run for good, and the run would end before its decay does.
    """

    def moved(leaf: Any) -> Any:
        schedule = isinstance(leaf, optax.ScaleByScheduleState)
        return leaf._replace(count=jnp.asarray(step, jnp.int32)) if schedule else leaf

    return jax.tree.map(
        moved, opt_state, is_leaf=lambda leaf: isinstance(leaf, optax.ScaleByScheduleState)
    )


def make_schedule(cfg: Optim, steps: int) -> optax.Schedule:
    """Linear warm-up to the peak, then the named decay to ``end_factor`` times the peak."""
    peak, rest = cfg.learning_rate, max(steps - cfg.warmup_steps, 1)
    if cfg.schedule == "cosine":
        decay = optax.cosine_decay_schedule(peak, rest, alpha=cfg.end_factor)
    elif cfg.schedule == "linear":
        decay = optax.linear_schedule(peak, peak * cfg.end_factor, rest)
    else:
        decay = optax.constant_schedule(peak)
    warmup = optax.linear_schedule(0.0, peak, cfg.warmup_steps)
    return optax.join_schedules([warmup, decay], [cfg.warmup_steps])


def _rule(cfg: Optim, schedule: optax.Schedule) -> optax.GradientTransformation:
    """The named update rule with decay and learning rate."""

    def decayed(tree: Any) -> Any:
        return _named(lambda name, _: group(name) == DECAYED, tree)

    if cfg.name == "adamw":
        return optax.adamw(
            schedule, cfg.b1, cfg.b2, cfg.eps, weight_decay=cfg.weight_decay, mask=decayed
        )
    if cfg.name == "lion":
        return optax.lion(schedule, cfg.b1, cfg.b2, weight_decay=cfg.weight_decay, mask=decayed)
    if cfg.name == "adafactor":
        return optax.chain(
            optax.scale_by_factored_rms(decay_rate=0.8),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(cfg.weight_decay, decayed),
            optax.scale_by_learning_rate(schedule),
        )
    return _muon(cfg, schedule)


def _muon(cfg: Optim, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Muon for the hidden matrices, AdamW without decay for everything else.

    A stack of layers is a stack of matrices: the last two axes are the matrix, whatever lies before
    them is batched. Updates are scaled by 0.2 sqrt(max(rows, columns)), which gives them the size
    that AdamW's have (Liu et al. 2025, arXiv 2502.16982, equation 4), so one learning rate serves.
    """

    def matrix(name: str, leaf: Any) -> Any:
        hidden = name.endswith("kernel") and not name.endswith(_PATCHES)
        return MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1) if hidden else None

    return muon(
        schedule,
        beta=MUON_BETA,
        weight_decay=cfg.weight_decay,
        consistent_rms=0.2,
        adam_b1=cfg.b1,
        adam_b2=cfg.b2,
        adam_learning_rate=lambda step: cfg.adam_factor * schedule(step),
        muon_weight_dimension_numbers=lambda tree: _named(matrix, tree),
    )


def state_shardings(
    transform: optax.GradientTransformation, params: Any, shardings: Any, mesh: jax.sharding.Mesh
) -> Any:
    """Places of the optimiser state: a moment lies where its parameter lies, the rest everywhere.

    Without this ``jax.jit`` would replicate every moment on its own. A leaf of
    the state belongs to the parameter whose dotted path ends its own, if the shapes agree.
    """
    by_path = {
        tuple(map(str, path)): (leaf.shape, place)
        for (path, leaf), place in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings), strict=True
        )
    }
    longest = max(map(len, by_path))

    def place(path: tuple, leaf: Any) -> Any:
        keys = tuple(map(str, path))
        for length in range(min(longest, len(keys)), 0, -1):
            found = by_path.get(keys[-length:])
            if found and found[0] == leaf.shape:
                return found[1]
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(transform.init, params))
