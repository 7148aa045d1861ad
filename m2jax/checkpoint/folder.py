# SPDX-License-Identifier: Apache-2.0
"""A model folder: parameters with their config, tokenizer and preprocessing, and no run around it.

It has the layout of one checkpoint of a run (``state`` and ``bundle``), so what reads a checkpoint
reads it. Orbax writes into a temporary sibling and renames it: the folder is complete or absent.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from m2jax.checkpoint import manager
from m2jax.config import UserError
from m2jax.config_dual import Architecture

CHUNK_BYTES = 64 * 2**20  # of a parameter, to a file; memory for writing is a few of them


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
    # Orbax would hold all parameters on the host at once. This lets one be there, the largest, and
    # not twice: the usual single-file store (OCDBT) keeps what it has written until the end.
    room: Any = (max(leaf.nbytes for leaf in jax.tree.leaves(params)) + CHUNK_BYTES) / 1e9
    handlers = ocp.CompositeCheckpointHandler(
        state=ocp.PyTreeCheckpointHandler(
            use_ocdbt=False, save_concurrent_gb=room, save_device_host_concurrent_gb=room
        ),
        bundle=ocp.JsonCheckpointHandler(),
    )
    state = {"params": params}
    chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), state)
    items = ocp.args.Composite(
        state=ocp.args.PyTreeSave(state, save_args=chunks), bundle=ocp.args.JsonSave(bundle)
    )
    try:
        with _without_merge_warning(), ocp.Checkpointer(handlers) as checkpointer:
            checkpointer.save(directory.absolute(), args=items)
    except BaseException as error:
        for part in directory.absolute().parent.glob(f"{directory.name}.orbax-checkpoint-tmp*"):
            shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(
                f"{directory}: cannot be written ({error.strerror}): make room there"
            ) from error
        raise


@contextlib.contextmanager
def _without_merge_warning() -> Iterator[None]:
    """Drops Orbax's warning that there is no single-file store to merge: there is none to be."""

    def keep(record: logging.LogRecord) -> bool:
        return "merge of OCDBT" not in record.getMessage()

    logger = logging.getLogger("absl")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
