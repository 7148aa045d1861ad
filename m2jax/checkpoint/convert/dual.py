# SPDX-License-Identifier: Apache-2.0
"""The tensors of a CLIP, SigLIP or Chinese-CLIP release to our parameters and back, exactly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from flax import nnx

from m2jax.checkpoint.convert.dual_names import IGNORED, Slot, slots
from m2jax.config import UserError
from m2jax.config_dual import Dual
from m2jax.models import params as params_lib
from m2jax.models.params import Params

SHOWN = 8  # names in one error line; the rest are counted


def inward(tensors: Mapping[str, np.ndarray], cfg: Dual, layout: str, where: str) -> Params:
    """Assembles parameters from a release's tensors, read one at a time.

    Args:
        tensors: by the release's names; a lazy mapping is read once per name.
        cfg: what the tensors belong to.
        layout: a row of ``dual_names.LAYOUTS``.
        where: the source, for errors.

    Returns:
        Nested dicts of NumPy arrays in ``cfg.param_dtype``.

    Raises:
        UserError: names that are missing or left over, a wrong shape, NaN or infinity.
    """
    table = slots(cfg, layout)
    _same_names(table, tensors, where)
    shapes = params_lib.flatten(params_lib.abstract(cfg).params)
    arrays = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in shapes.items()}
    for theirs, slot in table.items():
        tensor = np.asarray(tensors[theirs])
        targets = [_target(arrays[name], slot) for name in slot.rule.names]
        wanted = _their_shape(targets, slot)
        if tensor.shape != wanted:
            raise UserError(
                f"{where}: {theirs} {tensor.shape}: the config asks for {wanted}: "
                "use the config of these weights"
            )
        if not np.isfinite(tensor).all():
            raise UserError(f"{where}: {theirs}: holds NaN or infinity: get a sound copy")
        for target, part in zip(targets, slot.inward(tensor), strict=True):
            target[...] = part
    return nnx.traversals.unflatten_mapping(
        {tuple(name.split(".")): array for name, array in arrays.items()}
    )


def outward(params: Params, cfg: Dual, layout: str) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a release, in its names and layout; inverse of ``inward``."""
    arrays = params_lib.flatten(params)
    for theirs, slot in slots(cfg, layout).items():
        parts = [_target(arrays[name], slot) for name in slot.rule.names]
        tensor = slot.outward([np.asarray(part) for part in parts])
        yield theirs, np.ascontiguousarray(tensor).reshape(tensor.shape)  # it lifts () to (1,)


def _target(array: Any, slot: Slot) -> Any:
    """The part of a parameter that one tensor fills; a view where the array is NumPy's."""
    part = array[...] if slot.layer is None else array[slot.layer]
    return part if slot.rows is None else part[: slot.rows]


def _their_shape(targets: list[np.ndarray], slot: Slot) -> tuple[int, ...]:
    return slot.outward([np.broadcast_to(np.zeros((), x.dtype), x.shape) for x in targets]).shape


def _same_names(table: Mapping[str, Slot], tensors: Mapping[str, Any], where: str) -> None:
    """Refuses a file whose names are not those of the table, listing both differences."""
    missing = [name for name in table if name not in tensors]
    extra = [name for name in tensors if name not in table and not IGNORED.fullmatch(name)]
    parts = [
        f"{what} {', '.join(names[:SHOWN])}{f' and {rest} more' if rest > 0 else ''}"
        for what, names in (("missing", missing), ("left over", extra))
        for rest in [len(names) - SHOWN]
        if names
    ]
    if parts:
        raise UserError(
            f"{where}: {'; '.join(parts)}: name the right --arch, or a source that has its config"
        )
