# SPDX-License-Identifier: Apache-2.0
"""The model a run starts from: what it takes over, what it changes, and what it says about it.

Nothing is silently reset: every parameter is the source's, or is on the line that ``describe``
prints (interpolated, fresh, left out), or stops the run.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from m2jax import architectures, bundle, config_dual
from m2jax.checkpoint import manager
from m2jax.config import Experiment, Model, UserError, resolve
from m2jax.config_dual import Architecture, Dual
from m2jax.data.image import Preprocess
from m2jax.data.text import tokenizer_from_dict
from m2jax.dist.sharding import AxisRules
from m2jax.models import params as params_lib
from m2jax.models import positions
from m2jax.models.params import Params
from m2jax.train import dual_text, image_text
from m2jax.train.task import Task

FILE = "origin.json"  # in the work directory: a resumed run needs the source no more


@dataclass(frozen=True)
class Origin:
    """A source, fitted to a run."""

    experiment: Experiment  # with the source's sizes
    model: Architecture  # of the run
    assets: Mapping[str, Any]  # tokenizer and preprocessing of the run


class Taken(NamedTuple):
    """Parameters of a run, and where they came from, as dotted names."""

    params: Params
    kept: tuple[str, ...]
    interpolated: tuple[str, ...]
    fresh: tuple[str, ...]
    left_out: tuple[str, ...]  # of the source


def adopt(experiment: Experiment, workdir: Path | None = None) -> Origin:
    """Takes the sizes, tokenizer and preprocessing of ``finetune.init``.

    Args:
        experiment: a run with ``finetune.init``.
        workdir: of the run; where it already began, what it began with is read from there.

    Raises:
        UserError: the source cannot be read, lacks a tokenizer, or has other sizes than the config.
    """
    saved = _begun(workdir) if workdir else None
    if saved is None:
        source = experiment.finetune.init
        saved = bundle.read_saved(source) or _by_loading(source)
    tokenizer = saved.assets["tokenizer"]
    where = f"--init {experiment.finetune.init}"
    if tokenizer is None:
        raise UserError(f"{where}: has no tokenizer: import it again with --tokenizer DIR")
    length = tokenizer_from_dict(tokenizer)([""]).ids.shape[1]
    if isinstance(saved.model, Dual):
        model, seen = _fit_dual(experiment, saved.model, length, where)
    else:
        model = seen = _fit_m2(experiment, saved.model, length, where)
    had = saved.assets["preprocess"]
    old = had["size"]
    side = model.vision.image_size if isinstance(model, Dual) else model.image_size
    shortest = round(had.get("shortest", 0) * side / old)
    preprocess = Preprocess.from_dict({**had, "size": side, "shortest": shortest}, side)
    assets = {"tokenizer": tokenizer, "preprocess": preprocess.to_dict()}
    return Origin(dataclasses.replace(experiment, model=seen), model, assets)


def settled(experiment: Experiment) -> Experiment:
    """The experiment with every size known: those of its origin where it has one.

    Raises:
        UserError: as ``adopt``; or the origin is of a family that is trained but not planned.
    """
    if not experiment.finetune.init:
        return experiment
    origin = adopt(experiment)
    if isinstance(origin.model, Dual):
        raise UserError(
            f"finetune.init={experiment.finetune.init}: is a {origin.model.name} model, and only "
            "runs of an M2-Encoder can be planned: name one"
        )
    return origin.experiment


def remember(origin: Origin, workdir: Path) -> None:
    """Leaves in the work directory what ``adopt`` reads when the run goes on."""
    if (workdir / FILE).exists():
        return
    text = json.dumps(manager.bundle_item(origin.model, dict(origin.assets)))
    handle, name = tempfile.mkstemp(dir=workdir, prefix=FILE, suffix=".tmp")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(name, workdir / FILE)


def take(origin: Origin, task: Task, mesh: Mesh) -> Taken:
    """The source's parameters on the mesh, fitted to the run's shapes.

    Args:
        origin: of the run.
        task: whose parameters they become; what it adds to the model (biases of a loss) is fresh.
        mesh: where they go.

    Raises:
        UserError: parameters of other shapes, all of which are named.
    """
    tuned = origin.experiment.finetune
    source = bundle.load(tuned.init, mesh=mesh)
    target = task.model
    places = params_lib.shardings(target, mesh, AxisRules())
    have, want = params_lib.flatten(source.params), params_lib.flatten(target.params)
    heads = dual_text.HEADS if isinstance(origin.model, Dual) else image_text.HEADS
    again = [n for n in want if tuned.heads == "fresh" and n.startswith(heads)]
    fresh = [*again, *(n for n in want if n not in have)]
    table, first = positions.image_table(origin.model)
    moved = [table] if have[table].shape[0] != want[table].shape[0] else []
    _check_shapes(have, want, {*fresh, *moved}, tuned.init)
    by_name = params_lib.flatten(places)
    found = _fresh(task, origin.experiment.train.seed, fresh, by_name)
    for name, shape in want.items():
        if name in moved:
            value = positions.interpolate(have[name], first, shape.shape[0], by_name[name])
        elif name not in found:
            value = have[name]
        else:
            continue
        found[name] = jax.device_put(value.astype(shape.dtype), by_name[name])
    params = jax.tree_util.tree_map_with_path(
        lambda path, _: found[params_lib.dotted(path)], target.params
    )
    kept = tuple(n for n in want if n not in fresh and n not in moved)
    left_out = tuple(n for n in have if n not in want)
    return Taken(params, kept, tuple(moved), tuple(fresh), left_out)


def describe(origin: Origin, taken: Taken) -> str:
    """One line: what a run took over from its source, and what it did not."""
    tuned = origin.experiment.finetune
    parts = [f"{len(taken.kept)} parameters kept"]
    for names, what in (
        (taken.interpolated, "interpolated"),
        (taken.fresh, "fresh"),
        (taken.left_out, "left out"),
    ):
        parts.append(f"{what}: {', '.join(names) or 'none'}")
    parts.append(f"frozen tower: {tuned.freeze or 'none'}")
    return f"init {tuned.init}: {'; '.join(parts)}"


def _begun(workdir: Path) -> manager.Saved | None:
    """What a run that has begun started with."""
    file = workdir / FILE
    if not file.exists():
        return None
    try:
        return manager.parse_bundle(json.loads(file.read_text(encoding="utf-8")), str(file))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: unreadable ({error}): remove it to read --init again") from error


def _by_loading(source: str) -> manager.Saved:
    """Of a folder in another format: its config and tokenizer come with its parameters."""
    found = bundle.load(source)
    tokenizer = None if found.tokenizer is None else found.tokenizer.to_dict()
    assets = {"tokenizer": tokenizer, "preprocess": found.preprocessing.to_dict()}
    return manager.Saved(found.config, assets)


def _fit_m2(experiment: Experiment, source: Model, length: int, where: str) -> Model:
    """The source's sizes where the config leaves them open; the config's image size and head."""
    wanted = experiment.model
    free = {"image_size", *(("out_dim",) if experiment.finetune.heads == "fresh" else ())}
    sizes = {}
    for key in architectures.SIZES:
        want, had = getattr(wanted, key), getattr(source, key)
        sizes[key] = want if want and key in free else had
        if want and want != sizes[key]:
            raise UserError(
                f"{where}: model.{key} is {had} there and {want} in the config: leave it at 0"
            )
    sizes |= {"text_positions": source.text_positions, "max_text_len": length}
    model = dataclasses.replace(wanted, name=source.name, **sizes)
    return resolve(model, where)


def _fit_dual(experiment: Experiment, source: Dual, length: int, where: str) -> tuple[Dual, Model]:
    """The source with the config's image size and way of computing; and what batches must fit."""
    wanted = experiment.model
    for key in architectures.SIZES:
        want = getattr(wanted, key)
        if want and key not in ("image_size", "max_text_len"):
            raise UserError(
                f"{where}: is a {source.family} model, whose sizes are its own: leave "
                f"config.model.{key}={want} at 0"
            )
    side = wanted.image_size or source.vision.image_size
    model = dataclasses.replace(
        source,
        vision=dataclasses.replace(source.vision, image_size=side),
        **{k: getattr(wanted, k) for k in ("dtype", "param_dtype", "attention", "remat", "unroll")},
    )
    seen = dataclasses.replace(wanted, name=source.name, image_size=side, max_text_len=length)
    return config_dual.check(model, where), seen


def _fresh(
    task: Task, seed: int, names: Sequence[str], places: Mapping[str, Any]
) -> dict[str, jax.Array]:
    """Initial values of a few parameters; the compiler leaves the others out."""

    def initial() -> dict[str, jax.Array]:
        made = params_lib.flatten(task.init(jax.random.fold_in(jax.random.key(seed), 1)))
        return {name: made[name] for name in names}

    return dict(jax.jit(initial, out_shardings={name: places[name] for name in names})())


def _check_shapes(
    have: Mapping[str, Any], want: Mapping[str, Any], apart: set[str], source: str
) -> None:
    """Refuses parameters that do not fit, naming them."""
    wrong: Sequence[str] = [
        f"{name} {have[name].shape} there and {shape.shape} here"
        for name, shape in want.items()
        if name not in apart and have[name].shape != shape.shape
    ]
    if wrong:
        raise UserError(
            f"--init {source}: {len(wrong)} parameters have other shapes: {'; '.join(wrong)}: mend "
            "config.model"
        )
