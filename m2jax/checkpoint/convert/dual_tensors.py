# SPDX-License-Identifier: Apache-2.0
"""The tensors of a CLIP, SigLIP or Chinese-CLIP release to our parameters and back, exactly."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from m2jax.checkpoint.convert import safetensors_file
from m2jax.checkpoint.convert.dual_names import IGNORED, Slot, slots
from m2jax.checkpoint.convert.place import Pieces
from m2jax.config import UserError
from m2jax.config_dual import Dual
from m2jax.models import params as params_lib
from m2jax.models.params import Params

SHOWN = 8  # names in one error line; the rest are counted


def pieces(
    tensors: Mapping[str, np.ndarray],
    cfg: Dual,
    layout: str,
    where: str,
    allow: Sequence[str] = (),
) -> dict[str, Pieces]:
    """A release's tensors by the parameter they are part of, in our layout; all of them views.

    Args:
        tensors: by the release's names.
        cfg: what the tensors belong to.
        layout: a row of ``dual_names.LAYOUTS``.
        where: the source, for errors.
        allow: names, or patterns with ``*``, that may be missing or left over.

    Raises:
        UserError: names that are missing or left over, or a wrong shape.
    """
    table, wanted = slots(cfg, layout), shapes(cfg, layout)
    _same_names(table, tensors, where, allow)
    found: dict[str, dict[int | None, tuple[str, np.ndarray]]] = {}
    for theirs, slot in table.items():
        if theirs not in tensors:
            continue
        tensor = tensors[theirs]
        if tensor.shape != wanted[theirs]:
            raise UserError(
                f"{where}: {theirs} {tensor.shape}: the config asks for {wanted[theirs]}: "
                "use the config of these weights"
            )
        for ours, part in zip(slot.rule.names, slot.inward(tensor), strict=True):
            found.setdefault(ours, {})[slot.layer] = (theirs, part)
    return dict(found)


def shapes(cfg: Dual, layout: str) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a release of this config."""
    ours = params_lib.flatten(params_lib.abstract(cfg).params)
    found = {}
    for theirs, slot in slots(cfg, layout).items():
        shape = ours[slot.rule.names[0]].shape[0 if slot.layer is None else 1 :]
        found[theirs] = slot.shape(shape if slot.rows is None else (slot.rows, *shape[1:]))
    return found


class Release(Mapping[str, np.ndarray]):
    """The tensors of a model in a release's names and layout, each made when it is asked for."""

    def __init__(self, params: Params, cfg: Dual, layout: str) -> None:
        self._slots, self._arrays = slots(cfg, layout), params_lib.flatten(params)

    def __getitem__(self, name: str) -> np.ndarray:
        """One tensor; inverse of ``pieces``."""
        slot = self._slots[name]
        parts = [_part(self._arrays[ours], slot) for ours in slot.rule.names]
        return slot.outward([np.asarray(part) for part in parts])

    def __iter__(self):
        """The names, in the table's order."""
        return iter(self._slots)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self._slots)


def write(file: Path, params: Params, cfg: Dual, layout: str) -> None:
    """Writes a release's weights as safetensors, one tensor in memory at a time."""
    release = Release(params, cfg, layout)
    with file.open("wb") as handle:
        dtype = np.dtype(cfg.param_dtype)
        safetensors_file.write(handle, shapes(cfg, layout), dtype, release.__getitem__)


def _part(array: Any, slot: Slot) -> Any:
    """The part of a parameter that one tensor fills."""
    part = array if slot.layer is None else array[slot.layer]
    return part if slot.rows is None else part[: slot.rows]


def _same_names(
    table: Mapping[str, Slot], tensors: Mapping[str, Any], where: str, allow: Sequence[str]
) -> None:
    """Refuses a file whose names are not those of the table, listing both differences."""

    def wrong(names: Iterable[str], known: Mapping[str, Any]) -> list[str]:
        return [
            name
            for name in names
            if name not in known
            and not IGNORED.fullmatch(name)
            and not any(fnmatch.fnmatchcase(name, pattern) for pattern in allow)
        ]

    parts = []
    for what, names in (("missing", wrong(table, tensors)), ("left over", wrong(tensors, table))):
        if names:
            rest = len(names) - SHOWN
            more = f" and {rest} more" if rest > 0 else ""
            parts.append(f"{what} {', '.join(names[:SHOWN])}{more}")
    if parts:
        raise UserError(
            f"{where}: {'; '.join(parts)}: use the config of these weights, or allow the names "
            "with --allow-missing NAME"
        )
