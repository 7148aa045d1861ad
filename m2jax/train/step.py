# SPDX-License-Identifier: Apache-2.0
"""The training step: a pure function (state, batch) -> (state, metrics), jitted onto a mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from m2jax.config import Experiment, Guard, UserError
from m2jax.dist.sharding import AxisRules, batch_sharding, batch_shards, replicated, use_rules
from m2jax.losses import accumulation, fused, layout
from m2jax.models import fused_attention
from m2jax.models import params as params_lib
from m2jax.optim import Optimizer, at_step, make_optimizer, state_shardings
from m2jax.train import state as state_lib
from m2jax.train.state import TrainState
from m2jax.train.task import CARRIED, Batch, Metrics, Task, TwoPartTask

Gradient = Callable[[params_lib.Params, Batch, jax.Array], Any]  # -> (loss, metrics), gradient

NORM_MEAN_DECAY = 0.98  # of the guard's running mean of gradient norms


class Step(NamedTuple):
    """The compiled side of a run."""

    init: Callable[[], TrainState]  # a fresh state, each array made where it lies
    begin: Callable[[params_lib.Params], TrainState]  # the same around given parameters
    run: jax.stages.Wrapped  # (state, batch) -> (state, metrics), jitted; donates the state
    abstract_state: TrainState  # shapes with shardings: what a checkpoint is restored onto
    schedule: optax.Schedule


def make_step(
    experiment: Experiment,
    task: Task,
    mesh: Mesh,
    rules: AxisRules | None = None,
    *,
    optimizer: Optimizer | None = None,
) -> Step:
    """Jits initialisation and step of a task with the places of every array fixed.

    Args:
        experiment: the run.
        task: its objective.
        mesh: its devices.
        rules: from logical axes to those of the mesh.
        optimizer: where it is not the one that ``experiment.optim`` describes.

    Raises:
        UserError: a parameter or the batch does not divide over the mesh, a form of attention or
            a kernel of the loss that its devices do not have; see ``make_gradient``.
    """
    fused_attention.check(experiment.model.attention, mesh)
    contrastive = experiment.loss.contrastive
    fused.check(contrastive.kernel, mesh)
    if experiment.model.attention == "cudnn":
        layout.check_beside_cudnn(mesh, contrastive.impl, contrastive.group or None)
    rules = rules or AxisRules()
    decay = experiment.optim.layer_decay
    optimizer = optimizer or make_optimizer(
        experiment.optim,
        experiment.train.steps,
        frozen=task.frozen,
        scales=None if decay == 1 else task.layer_scales(decay),
    )
    places = _state_places(experiment, task, optimizer, mesh, rules)
    gradient = make_gradient(experiment, task, mesh)

    def init() -> TrainState:
        return begin(task.init(jax.random.fold_in(jax.random.key(experiment.train.seed), 1)))

    def begin(params: params_lib.Params) -> TrainState:
        opt_state = optimizer.transform.init(params)
        return state_lib.fresh(
            params, opt_state, experiment.train.seed, ema=experiment.optim.ema > 0
        )

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        with use_rules(mesh, rules):
            return update(experiment, gradient, task, optimizer, state, batch)

    run = jax.jit(
        step,
        in_shardings=(places, batch_sharding(mesh)),
        out_shardings=(places, replicated(mesh)),
        donate_argnums=0,
    )
    shapes = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        jax.eval_shape(init),
        places,
    )
    return Step(
        jax.jit(init, out_shardings=places),
        jax.jit(begin, out_shardings=places, donate_argnums=0),
        run,
        shapes,
        optimizer.schedule,
    )


def make_gradient(experiment: Experiment, task: Task, mesh: Mesh) -> Gradient:
    """Loss and gradient of a batch, in one piece or accumulated over ``train.accumulate`` parts.

    Raises:
        UserError: a task whose loss cannot be cut in two, or a batch that does not divide.
    """
    train, size = experiment.train, experiment.data.batch_size
    if train.accumulate == 1:
        return jax.value_and_grad(task.loss, has_aux=True)
    if not isinstance(task, TwoPartTask):
        raise UserError(
            f"train.accumulate={train.accumulate}: {type(task).__name__} has no encode and "
            "contrast: set it to 1"
        )
    devices = batch_shards(mesh.shape)
    if train.accumulate < 1 or size % (train.accumulate * devices):
        raise UserError(
            f"train.accumulate={train.accumulate}: data.batch_size={size} does not divide into "
            f"{train.accumulate} parts on each of {devices} devices: change one"
        )
    return accumulation.value_and_grad(
        task.encode,
        task.contrast,
        count=train.accumulate,
        mesh=mesh,
        detach=train.accumulation == "detach",
    )


def update(
    experiment: Experiment,
    gradient: Gradient,
    task: Task,
    optimizer: Optimizer,
    state: TrainState,
    batch: Batch,
) -> tuple[TrainState, Metrics]:
    """One step, unjitted: gradient, guard, optimiser, projection, average."""
    rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    (loss, told), grads = gradient(state.params, batch, rng)
    metrics = {name: value for name, value in told.items() if name != CARRIED}
    norm = optax.tree.norm(grads)
    accepted = accept(experiment.train.guard, state, loss, norm)

    before = at_step(state.opt_state, state.step)
    updates, opt_state = optimizer.transform.update(grads, before, state.params)
    moved = cast(params_lib.Params, optax.apply_updates(state.params, updates))
    params = {**task.after_update(moved), **told.get(CARRIED, {})}
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(accepted, new, old),
        (params, opt_state),
        (state.params, state.opt_state),
    )
    mean = NORM_MEAN_DECAY * state.norm_mean + (1 - NORM_MEAN_DECAY) * norm
    mean = jnp.where(state.norm_mean == 0, norm, mean)
    new_state = TrainState(
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        ema=_average(experiment.optim.ema, state, params),
        rng=state.rng,
        norm_mean=jnp.where(accepted, mean, state.norm_mean),
        skipped=jnp.where(accepted, 0, state.skipped + 1),
    )
    logged = {"loss": loss, "grad_norm": norm, "skipped": new_state.skipped, **metrics}
    return new_state, logged


def accept(guard: Guard, state: TrainState, loss: jax.Array, norm: jax.Array) -> jax.Array:
    """Whether a step may change the parameters: finite, and no sudden jump of the gradient."""
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    if not guard.factor:
        return finite
    warm = state.step >= guard.warmup_steps
    return finite & ~(warm & (norm > guard.factor * state.norm_mean))


def _average(
    decay: float, state: TrainState, params: params_lib.Params
) -> params_lib.Params | None:
    """The running average with the usual warm-up of its decay: (1 + t) / (10 + t) at most."""
    if state.ema is None:
        return None
    t = state.step.astype(jnp.float32)
    keep = jnp.minimum(decay, (1 + t) / (10 + t))
    return jax.tree.map(lambda mean, new: keep * mean + (1 - keep) * new, state.ema, params)


def _state_places(
    experiment: Experiment, task: Task, optimizer: Optimizer, mesh: Mesh, rules: AxisRules
) -> TrainState:
    """The sharding of every array of the state."""
    shapes = task.model.params
    params = params_lib.shardings(task.model, mesh, rules)
    everywhere: Any = replicated(mesh)  # a tree of places has the shape of the state
    return TrainState(
        step=everywhere,
        params=params,
        opt_state=state_shardings(optimizer.transform, shapes, params, mesh),
        ema=params if experiment.optim.ema > 0 else None,
        rng=everywhere,
        norm_mean=everywhere,
        skipped=everywhere,
    )
