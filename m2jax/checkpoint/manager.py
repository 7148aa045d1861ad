# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: everything it needs to go on, written while training goes on (Orbax).

A checkpoint holds three items: ``state`` (every array of the train state, restored onto the
sharding asked for), ``data`` (where the loader was) and ``bundle`` (config, tokenizer and
preprocessing: what makes the parameters usable by someone else). A checkpoint is complete or
absent: Orbax writes into a temporary folder and renames it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import orbax.checkpoint as ocp
from etils import epath

from m2jax import architectures, config_dual
from m2jax import config as config_lib
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
    """

    def __init__(
        self, workdir: Path, experiment: config_lib.Experiment, assets: dict[str, Any]
    ) -> None:
        self._experiment = experiment
        self._bundle = _bundle(experiment, assets)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=experiment.checkpoint.keep, enable_async_checkpointing=True
        )
        self._manager = ocp.CheckpointManager(folder(workdir), options=options)

    def save(self, step: int, state: Any, data: dict[str, Any]) -> None:
        """Starts a save of the state after ``step`` steps; a step already saved is left alone."""
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave(data),
            bundle=ocp.args.JsonSave(self._bundle),
        )
        self._manager.save(step, args=items, force=True)

    def restore(self, abstract_state: Any, *, before: int | None = None) -> Restored | None:
        """The newest checkpoint (older than ``before``), placed as ``abstract_state`` says.

        Returns:
            ``None`` when there is none.

        Raises:
            UserError: the checkpoint is of another architecture or cannot be read.
        """
        self.wait()
        steps = [s for s in self._manager.all_steps() if before is None or s < before]
        if not steps:
            return None
        step = max(steps)
        where = f"{self._manager.directory}/{step}"
        bundle = read_bundle(Path(self._manager.directory) / str(step))
        _same_architecture(bundle.model, self._experiment.model, where)
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract_state), data=ocp.args.JsonRestore()
        )
        try:
            restored = self._manager.restore(step, args=items)
        except (ValueError, KeyError, OSError, FileNotFoundError) as error:
            reason = str(error).split("\n")[0][:200]
            raise UserError(
                f"{where}: cannot be restored ({reason}): remove the folder to use an older one"
            ) from error
        return Restored(step, restored["state"], restored["data"])

    def wait(self) -> None:
        """Blocks until every started save is complete."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and lets go of the folder."""
        self._manager.close()


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
        raise UserError(
            f"{checkpoint}: no readable checkpoint ({type(error).__name__}): "
            "remove the folder to use the one before it"
        ) from error
    where = f"{checkpoint}/bundle"
    if not isinstance(saved, dict):
        raise UserError(f"{where}: holds no JSON object: use another checkpoint")
    if saved.get("format") != FORMAT:
        raise UserError(
            f"{checkpoint}: format {saved.get('format')} but this m2jax reads {FORMAT}: update it"
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
        reason = str(error).split("\n")[0][:200]
        raise UserError(
            f"{where}: parameters cannot be read ({reason}): use another checkpoint"
        ) from error


def _same_architecture(saved: Architecture, wanted: config_lib.Model, where: str) -> None:
    """Refuses parameters of other shapes, naming the first size that differs."""
    for key in architectures.SIZES:
        had, want = getattr(saved, key, "absent"), getattr(wanted, key)
        if had != want:
            raise UserError(
                f"{where}: model.{key} is {had} there and {want} in this run: "
                "use the config of that run or another --workdir"
            )
