# SPDX-License-Identifier: Apache-2.0
"""From what an M2-Encoder checkpoint holds to one tensor per official name (spec section 11).

The official loader takes three layouts and copies what fits by name, in silence. The rules for
names and the image position table are its own; the silence is not: whatever is missing, left over
or of another shape is an error here unless the caller allows it by name.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped

from m2jax import config as config_lib
from m2jax.checkpoint.convert.m2_names import slots
from m2jax.config import UserError
from m2jax.models import params as params_lib

POSITIONS = "backbone.encoder.embed_positions.A.weight"
DEEPSPEED = "_forward_module."
TOKENIZER = "visual_tokenizer"  # of the training objectives; no part of the model
_SPECIAL_ROWS = 3  # of the position table: two that nothing reads, then [CLS]
_LAYER = re.compile(r"(.*\blayers\.)(\d{1,9})(\..*)")

Tensors = dict[str, np.ndarray]


class Official(NamedTuple):
    """The tensors of a checkpoint that the model has a place for."""

    tensors: Tensors
    layout: str  # lightning | deepspeed | model | bare
    dropped: list[str]  # names that were there and belong nowhere
    missing: list[str]  # names that were not there, all of them allowed


def shapes(cfg: config_lib.Model) -> dict[str, tuple[int, ...]]:
    """The shape of every official tensor of a model of these sizes (spec section 14)."""
    ours = params_lib.flatten(params_lib.abstract(cfg).params)
    found = {}
    for name, slot in slots(cfg).items():
        shape = ours[slot.name].shape[0 if slot.layer is None else 1 :]
        if slot.rows:
            shape = (slot.rows, *shape[1:])
        found[name] = slot.outward(np.broadcast_to(np.int8(0), shape)).shape
    return found


def official(
    content: Mapping[str, Any], cfg: config_lib.Model, where: str, allow: Sequence[str] = ()
) -> Official:
    """Applies the release's rules and refuses what they would have passed over.

    Args:
        content: what ``weights.read`` gave.
        cfg: the resolved model.
        where: the file, for errors.
        allow: names, or patterns with ``*``, that may be missing or left over.

    Raises:
        UserError: names missing, left over or of other shapes than ``cfg`` asks for.
    """
    wanted = shapes(cfg)
    tensors, layout, dropped = _unwrap(content, wanted[POSITIONS][0], where)
    missing = sorted(set(wanted) - set(tensors))
    left_over = sorted(set(tensors) - set(wanted))
    bad_missing, bad_left = (
        [n for n in names if not _allowed(n, allow)] for names in (missing, left_over)
    )
    if bad_missing or bad_left:
        parts = [
            f"{len(names)} {kind} ({listed(names)})"
            for kind, names in (("missing", bad_missing), ("left over", bad_left))
            if names
        ]
        raise UserError(
            f"{where}: tensors {' and '.join(parts)}: name the right --arch, or allow them with "
            "--allow-missing NAME"
        )
    kept = {name: tensors[name] for name in wanted if name in tensors}
    for name, tensor in kept.items():
        if tensor.shape != wanted[name]:
            raise UserError(
                f"{where}: {name} is {list(tensor.shape)} but {cfg.name} has "
                f"{list(wanted[name])}: name the right --arch"
            )
    return Official(kept, layout, sorted([*dropped, *left_over]), missing)


def interpolate(table: Shaped[np.ndarray, "rows d"], rows: int) -> Shaped[np.ndarray, "new d"]:
    """The image position table for another grid, by area averages; same dtype.

    Rows 0 to 2 stay; the rest is a square grid, row by row, whose new cell i averages the old cells
    [floor(i old / new), ceil((i + 1) old / new)) along each side (torch's ``mode="area"``).

    Raises:
        UserError: the rows form no square grid.
    """
    old, new = (math.isqrt(max(0, n - _SPECIAL_ROWS)) for n in (len(table), rows))
    if not old or [old**2 + _SPECIAL_ROWS, new**2 + _SPECIAL_ROWS] != [len(table), rows]:
        raise UserError(
            f"{POSITIONS}: {len(table)} rows do not fit {rows}: both must be a square plus "
            f"{_SPECIAL_ROWS}: name the right --arch"
        )
    bins = np.zeros((new, old), np.float32)
    for i in range(new):
        cells = slice(i * old // new, -(-(i + 1) * old // new))
        bins[i, cells] = 1 / (cells.stop - cells.start)
    grid = table[_SPECIAL_ROWS:].astype(np.float32).reshape(old, old, -1)
    grid = np.einsum("io,jp,opd->ijd", bins, bins, grid).reshape(new * new, -1)
    return np.concatenate([table[:_SPECIAL_ROWS], grid.astype(table.dtype)])


def _unwrap(content: Mapping[str, Any], rows: int, where: str) -> tuple[Tensors, str, list[str]]:
    """The tensors under their official names, the layout they had, and the names dropped."""
    if "state_dict" in content:
        tensors = _tensors(content["state_dict"], f"{where}: state_dict")
        dropped = [name for name in tensors if TOKENIZER in name]
        tensors = {name: tensor for name, tensor in tensors.items() if TOKENIZER not in name}
        table = tensors.get(POSITIONS)
        if table is not None and table.ndim == 2:
            few = len(table) < rows
            tensors[POSITIONS] = interpolate(table, rows) if few else table[:rows]
        return tensors, "lightning", dropped
    if "module" in content:
        tensors = _tensors(content["module"], f"{where}: module")
        return _deepspeed(tensors, rows, where), "deepspeed", []
    if "model" in content:
        return _tensors(content["model"], f"{where}: model"), "model", []
    tensors = _tensors(content, where)
    if next(iter(tensors), "").startswith(DEEPSPEED):
        return _deepspeed(tensors, rows, where), "deepspeed", []
    return tensors, "bare", []


def _deepspeed(tensors: Tensors, rows: int, where: str) -> Tensors:
    """Strips the prefix; a table under a stripped name is always put on the model's grid."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        plain = name.removeprefix(DEEPSPEED)
        if plain in found:
            raise UserError(f"{where}: {plain} is there with and without {DEEPSPEED}: remove one")
        moved = plain == POSITIONS != name and tensor.ndim == 2 and len(tensor) != rows
        found[plain] = interpolate(tensor, rows) if moved else tensor
    return found


def _tensors(content: Any, where: str) -> Tensors:
    """The tensors of a mapping that holds nothing else."""
    if not isinstance(content, Mapping):
        raise UserError(f"{where}: holds no named tensors: name a checkpoint of M2-Encoder")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, np.ndarray):
            raise UserError(f"{where}: {name!r} is no tensor: save the model's state_dict alone")
    return dict(content)


def _allowed(name: str, allow: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in allow)


def listed(names: Sequence[str]) -> str:
    """Every name, those that differ in the layer alone as one: ``a.layers.{0-8}.b``."""
    groups: dict[tuple[str, str], list[int | None]] = {}
    for name in names:
        match = _LAYER.match(name)
        head, number, tail = match.groups() if match else (name, None, "")
        groups.setdefault((head, tail), []).append(None if number is None else int(number))
    return ", ".join(head + _span(numbers) + tail for (head, tail), numbers in groups.items())


def _span(numbers: list[int | None]) -> str:
    """Layer numbers in short: 3 or {0-2,5}; nothing where there are none."""
    layers = sorted(n for n in numbers if n is not None)
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    text = ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"{{{text}}}" if len(layers) > 1 else text
