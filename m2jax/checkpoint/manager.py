# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: everything it needs to go on, written while training goes on (Orbax).

A checkpoint holds three items: ``state`` (every array of the train state, restored onto the
sharding asked for), ``data`` (where the loader was) and ``bundle`` (config, tokenizer and
preprocessing: what makes the parameters usable by someone else). A checkpoint is complete or
absent: Orbax writes into a temporary folder and renames it. What damages one later (a truncated
file, a bad disk) costs the steps since the one before it, not the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from m2jax import architectures, config_dual
from m2jax import config as config_lib
from m2jax.checkpoint import parts as parts_lib
from m2jax.checkpoint.late_reads import silence_late_reads
from m2jax.checkpoint.orbax_manager import Manager
from m2jax.checkpoint.retention import Best, retention
from m2jax.checkpoint.store import DamagedError
from m2jax.config import UserError
from m2jax.config_dual import Architecture, Dual

FORMAT = 1  # of the folder; raised when a reader of today could not read it


class Restored(NamedTuple):
    """What a checkpoint gave back."""

    step: int
    state: Any
    data: dict[str, Any]


class Checkpoints:
    """The checkpoints of one work directory.

    Args:
        workdir: the run's folder; checkpoints lie in ``checkpoints/STEP``.
        experiment: the run, saved beside the arrays and checked on restore.
        assets: tokenizer and preprocessing as JSON-able data, saved as they are.
        model: of the run, where it is not ``experiment.model``.
        parts: of a run on a store whose processes have no folder in common.

    Raises:
        UserError: ``checkpoint.every`` or ``checkpoint.keep`` is below 1.
    """

    def __init__(
        self,
        workdir: Path,
        experiment: config_lib.Experiment,
        assets: dict[str, Any],
        model: Architecture | None = None,
        parts: parts_lib.Parts | None = None,
    ) -> None:
        self._parts = parts
        self._experiment, self._model = experiment, model or experiment.model
        self._bundle = (
            bundle_item(model, assets) if isinstance(model, Dual) else _bundle(experiment, assets)
        )
        best = experiment.checkpoint.best
        self._best = Best(best, folder(workdir)) if best else None
        options = ocp.CheckpointManagerOptions(
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,  # what a killed process left half-written
            preservation_policy=retention(experiment.checkpoint, self._best),
        )
        registry = None
        if parts:
            options = dataclasses.replace(options, **parts_lib.alone_options())
            registry = parts_lib.registry()
        where = folder(workdir)
        self._manager = Manager(where, options=options, handler_registry=registry)

    def save(
        self,
        step: int,
        state: Any,
        data: dict[str, Any],
        *,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Starts a save of the state after ``step`` steps; a step already saved is left alone.

        Args:
            step: how many steps the state has seen.
            state: the arrays; copied before this returns, so they may be donated.
            data: the loader's state.
            metrics: what ``checkpoint.best`` chooses by, where that is known now; see ``score``.

        Raises:
            UserError: this save could not begin, or the one before it could not be written.
        """
        if step in self._manager.all_steps():
            return
        if metrics is not None:
            self.score(step, metrics)
        items = ocp.args.Composite(
            state=(ocp.args.PyTreeSave if self._parts else ocp.args.StandardSave)(state),
            data=ocp.args.JsonSave(data),
            bundle=ocp.args.JsonSave(self._bundle),
        )
        with _named_errors(f"{self._manager.directory}/{step}"):
            self._manager.save(step, args=items, force=True)

    @property
    def saved(self) -> Saved:
        """What its checkpoints say beside the arrays, as ``read_bundle`` gives it."""
        return parse_bundle(self._bundle, str(self._manager.directory))

    def score(self, step: int, figures: Mapping[str, float]) -> None:
        """Notes what is known of a checkpoint, where ``checkpoint.best`` chooses by something.

        Raises:
            UserError: it names none of the first process's figures.
        """
        if self._best is not None:
            self._best.note(step, figures)

    def restore(self, abstract_state: Any, *, until: int | None = None) -> Restored | None:
        """The newest checkpoint that can be read, placed as ``abstract_state`` says.

        With ``until``, the newest of those saved at that step or before it.

        Damaged ones that are newer are renamed to ``STEP.damaged``, so that their steps can be
        saved again; a line on standard error says so. All processes take the same one.

        Returns:
            ``None`` when there is none.

        Raises:
            UserError: the newest checkpoint is of another architecture, or none can be read.
        """
        self.wait()
        damaged: dict[int, str] = {}
        known = self._parts.steps() if self._parts else self._manager.all_steps()
        steps = [s for s in known if until is None or s <= until]
        for step in sorted(steps, reverse=True):
            restored, reason = self._read(step, abstract_state)
            if everyone(not reason):
                self._put_aside(damaged, step)
                return restored
            damaged[step] = reason or "another process could not read it"
        if damaged:
            step, others = max(damaged), len(damaged) - 1
            raise DamagedError(
                f"{self._manager.directory}/{step}: cannot be restored ({damaged[step]})"
                f"{f', nor can the {others} before it' if others else ''}: use the config it was "
                "saved with, or another --workdir"
            )
        return None

    def _read(self, step: int, abstract_state: Any) -> tuple[Restored | None, str]:
        """One checkpoint, or why it cannot be read; without waiting for the other processes."""
        where = epath.Path(self._manager.directory) / str(step)
        try:
            if self._parts:
                self._parts.bring(step, abstract_state)
            saved = read_bundle(Path(where))
            _same_architecture(saved.model, self._model, str(where))
            data = ocp.JsonCheckpointHandler().restore(where / "data")
            state = ocp.StandardCheckpointHandler().restore(
                where / "state", args=ocp.args.StandardRestore(abstract_state)
            )
        except UserError as error:
            if not isinstance(error, DamagedError):
                raise
            return None, str(error)
        except Exception as error:  # Orbax raises a bare one where a file of an array is missing
            reason = f"{type(error).__name__}: {first_line(error)}"
        else:
            return Restored(step, state, dict(data)), ""
        silence_late_reads()
        return None, reason

    def _put_aside(self, damaged: dict[int, str], step: int) -> None:
        """Renames damaged checkpoints and says where the run goes on instead."""
        if not damaged:
            return
        if self._parts:
            self._parts.set_aside(damaged)
        if self._parts or jax.process_index() == 0:
            directory = epath.Path(self._manager.directory)
            for bad, reason in damaged.items():
                there = directory / f"{bad}.damaged"
                if there.exists():
                    there.rmtree()
                if (directory / str(bad)).exists():  # of a run in parts it may be there alone
                    (directory / str(bad)).rename(there)
                if jax.process_index() != 0:
                    continue
                print(
                    f"warning: {directory}/{bad}: damaged ({reason}): renamed to {there.name}; "
                    f"the run goes on from step {step}",
                    file=sys.stderr,
                    flush=True,
                )
        if self._parts:
            self._parts.forget(damaged)
        everyone(True)  # nobody looks before it is done
        self._manager.reload()

    def wait(self) -> None:
        """Blocks until every started save is complete.

        Raises:
            UserError: one of them could not be written.
        """
        with _named_errors(str(self._manager.directory)):
            self._manager.wait_until_finished()
        self._tag_best()

    def _tag_best(self) -> None:
        """Leaves the step of the best checkpoint in ``checkpoints/best``, where one is chosen."""
        if self._best is None or jax.process_index() != 0:
            return
        step = self._best.of(self._manager.all_steps())
        if step is not None:
            tag = epath.Path(self._manager.directory) / "best"
            temporary = tag.with_suffix(".tmp")
            temporary.write_text(f"{step}\n")
            temporary.replace(tag)

    def close(self) -> None:
        """Waits and lets go of the folder.

        Raises:
            UserError: a save could not be written.
        """
        with _named_errors(str(self._manager.directory)):
            self._manager.close()


def everyone(fine: bool) -> bool:
    """Whether ``fine`` holds in every process of the run; waits for all of them."""
    return bool(np.all(multihost_utils.process_allgather(np.asarray(fine))))


@contextlib.contextmanager
def _named_errors(where: str) -> Iterator[None]:
    """Turns what a failed save raises, now or later, into one line."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, TimeoutError) as error:
        raise UserError(
            f"{where}: could not be written ({first_line(error)}): free space or mend the storage, "
            "then start the run again: it goes on from the last complete checkpoint"
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, cut to what a terminal shows."""
    return str(error).split("\n")[0][:200]


class Saved(NamedTuple):
    """The part of a checkpoint that is no array."""

    model: Architecture
    assets: dict[str, Any]
    experiment: config_lib.Experiment | None = None  # of the run, where there was one


def bundle_item(model: Architecture, assets: dict[str, Any]) -> dict[str, Any]:
    """What makes parameters usable by someone else, as JSON; ``read_bundle`` is the inverse."""
    if isinstance(model, Dual):
        return {"format": FORMAT, "dual": config_dual.to_json(model), "assets": assets}
    return _bundle(config_lib.Experiment(model=model), assets)


def _bundle(experiment: config_lib.Experiment, assets: dict[str, Any]) -> dict[str, Any]:
    return {"format": FORMAT, "config": config_lib.to_json(experiment), "assets": assets}


def folder(workdir: Path) -> Path:
    """Where a work directory keeps its checkpoints; absolute, as Orbax asks."""
    return (workdir / "checkpoints").absolute()


def newest(workdir: Path) -> Path:
    """The newest complete checkpoint of a work directory.

    Raises:
        UserError: the directory holds none.
    """
    steps = [p for p in folder(workdir).glob("*") if p.is_dir() and p.name.isdigit()]
    if not steps:
        raise UserError(f"{workdir}: holds no checkpoint: train into it or name another directory")
    return max(steps, key=lambda p: int(p.name))


def read_bundle(checkpoint: Path) -> Saved:
    """Config and assets of one checkpoint folder.

    Raises:
        UserError: the folder is no checkpoint, damaged, or of a newer format.
    """
    handler = ocp.JsonCheckpointHandler()
    try:
        saved = handler.restore(epath.Path(checkpoint) / "bundle")
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(
            f"{checkpoint}: no readable checkpoint ({type(error).__name__}): "
            "remove the folder to use the one before it"
        ) from error
    return parse_bundle(saved, f"{checkpoint}/bundle")


def parse_bundle(saved: Any, where: str) -> Saved:
    """Inverse of ``bundle_item``; ``where`` names the source in errors.

    Raises:
        UserError: damaged, or of a newer format.
    """
    if not isinstance(saved, dict):
        raise UserError(f"{where}: holds no JSON object: use another checkpoint")
    if saved.get("format") != FORMAT:
        raise UserError(
            f"{where}: format {saved.get('format')} but this m2jax reads {FORMAT}: update it"
        )
    assets, text = saved.get("assets"), saved.get("dual", saved.get("config"))
    if not isinstance(text, str) or not isinstance(assets, dict):
        raise UserError(f"{where}: lacks its config or its assets: use another checkpoint")
    if not {"tokenizer", "preprocess"} <= set(assets):
        raise UserError(f"{where}: lacks tokenizer or preprocess: use another checkpoint")
    if "dual" in saved:
        return Saved(config_dual.from_json(text, where), assets)
    experiment = config_lib.from_json(text, where)
    return Saved(config_lib.resolve(experiment.model, f"{where}: model"), assets, experiment)


def read_params(checkpoint: Path, abstract_params: Any) -> Any:
    """The parameters alone (the averaged ones where the run kept them), nothing else read.

    Args:
        checkpoint: one checkpoint folder.
        abstract_params: shapes, with shardings, of the parameters wanted: all, or a subtree such as
            one tower.

    Raises:
        UserError: the arrays are missing, damaged, or of other shapes.
    """
    handler = ocp.PyTreeCheckpointHandler()
    where = epath.Path(checkpoint) / "state"
    try:
        known = handler.metadata(where).tree
        key = "ema" if known.get("ema") else "params"
        item = {key: abstract_params}
        args = ocp.args.PyTreeRestore(
            item,
            restore_args=ocp.checkpoint_utils.construct_restore_args(item),
            partial_restore=True,
        )
        return handler.restore(where, args=args)[key]
    except Exception as error:  # Orbax raises a bare one where a file of an array is missing
        reason = first_line(error)
    silence_late_reads()
    raise DamagedError(f"{where}: parameters cannot be read ({reason}): use another checkpoint")


def _same_architecture(saved: Architecture, wanted: Architecture, where: str) -> None:
    """Refuses parameters of other shapes, naming the first size that differs."""
    for key, want in _sizes(wanted).items():
        had = _sizes(saved).get(key, "absent")
        if had != want:
            raise UserError(
                f"{where}: model.{key} is {had} there and {want} in this run: "
                "use the config of that run or another --workdir"
            )


def _sizes(model: Architecture) -> dict[str, Any]:
    """What must agree for parameters to fit."""
    if isinstance(model, Dual):
        return {"vision": model.vision, "text": model.text, "out_dim": model.out_dim}
    return {key: getattr(model, key) for key in architectures.SIZES}
