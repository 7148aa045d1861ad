# SPDX-License-Identifier: Apache-2.0
"""A model folder: parameters with their config, tokenizer and preprocessing, and no run around it.

It has the layout of one checkpoint of a run (``state`` and ``bundle``), so what reads a checkpoint
reads it. Orbax writes into a temporary sibling and renames it: the folder is complete or absent.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from m2jax.checkpoint import manager
from m2jax.config import UserError
from m2jax.config_dual import Architecture

WRITING_GB = 1  # of parameters on their way to disk at any time


def check_absent(directory: Path) -> None:
    """Refuses a destination that exists or cannot be made, before any long work is done for it.

    Raises:
        UserError: something is there already, or the folder it is to lie in is missing.
    """
    if directory.exists():
        raise UserError(f"{directory}: exists already: remove it or name another folder")
    if not directory.absolute().parent.is_dir():
        raise UserError(f"{directory}: no such folder {directory.absolute().parent}: make it first")


def write(
    directory: Path,
    model: Architecture,
    params: Any,
    *,
    tokenizer: Mapping[str, Any] | None,
    preprocess: Mapping[str, Any],
) -> None:
    """Writes a model folder.

    Args:
        directory: the folder to make.
        model: the resolved config of the parameters.
        params: nested dicts of arrays, wherever they lie.
        tokenizer: ``to_dict()`` of the tokenizer; ``None`` where the model has none.
        preprocess: ``to_dict()`` of the preprocessing.

    Raises:
        UserError: the folder exists or cannot be made.
    """
    check_absent(directory)
    assets = {"tokenizer": tokenizer, "preprocess": preprocess}
    bundle = manager.bundle_item(model, assets)
    handlers = ocp.CompositeCheckpointHandler(
        state=ocp.PyTreeCheckpointHandler(save_concurrent_gb=WRITING_GB),
        bundle=ocp.JsonCheckpointHandler(),
    )
    items = ocp.args.Composite(
        state=ocp.args.PyTreeSave({"params": params}), bundle=ocp.args.JsonSave(bundle)
    )
    try:
        with ocp.Checkpointer(handlers) as checkpointer:
            checkpointer.save(directory.absolute(), args=items)
    except BaseException as error:
        for part in directory.absolute().parent.glob(f"{directory.name}.orbax-checkpoint-tmp*"):
            shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(
                f"{directory}: cannot be written ({error.strerror}): make room there"
            ) from error
        raise
