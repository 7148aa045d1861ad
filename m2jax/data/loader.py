# SPDX-License-Identifier: Apache-2.0
"""Global batches on the mesh, in an order that depends on the seed and the position alone.

A source gives one batch for one index, without state; Grain counts the indices, prepares batches
ahead in threads, and its iterator's state is what a checkpoint keeps. Each process makes its own
rows of every global batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from m2jax.config import Experiment, UserError
from m2jax.dist.sharding import BATCH_AXES, batch_sharding

HostBatch = Mapping[str, np.ndarray]


@runtime_checkable  # the tests check types as they run
class Source(Protocol):
    """A data set as random-access batches."""

    assets: dict[str, Any]  # tokenizer and preprocessing, as checkpoints keep them

    def batch(self, index: int, rows: slice) -> HostBatch:
        """Rows of batch ``index``: the same whatever was asked before."""
        ...


def _emoji(experiment: Experiment) -> Source:
    from m2jax.data.emoji.batches import EmojiBatches

    return EmojiBatches.of(experiment)


def _scenes(experiment: Experiment) -> Source:
    from m2jax.data.emoji.scenes import SceneBatches

    return SceneBatches.of(experiment)


# By data.name.
SOURCES: dict[str, Callable[[Experiment], Source]] = {"emoji": _emoji, "emoji-scenes": _scenes}


class Loader:
    """An endless iterator of global batches.

    Args:
        source: where batches come from.
        mesh: where they go; rows lie over its batch axes.
        batch_size: rows of a global batch.
        prefetch: batches prepared ahead.
    """

    def __init__(self, source: Source, mesh: Mesh, batch_size: int, prefetch: int) -> None:
        self.assets = source.assets
        self._sharding = batch_sharding(mesh)
        share = batch_size // jax.process_count()
        rows = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
        indices = grain.MapDataset.range(2**31 - 1)
        batches = indices.map(lambda index: source.batch(int(index), rows))
        options = grain.ReadOptions(num_threads=1 if prefetch else 0, prefetch_buffer_size=prefetch)
        self._iterator = iter(batches.to_iter_dataset(options))

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> dict[str, jax.Array]:
        batch = next(self._iterator)
        return {
            name: jax.make_array_from_process_local_data(self._sharding, rows)
            for name, rows in batch.items()
        }

    def get_state(self) -> dict[str, Any]:
        """Where the loader is; JSON-able."""
        return self._iterator.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to where another loader of the same experiment was."""
        self._iterator.set_state(state)

    def close(self) -> None:
        """Stops preparing batches."""
        self._iterator.close()


def make_loader(experiment: Experiment, mesh: Mesh) -> Loader:
    """The training batches of an experiment.

    Raises:
        UserError: an unknown data set, or a batch the devices or processes do not divide.
    """
    cfg = experiment.data
    if cfg.name not in SOURCES:
        raise UserError(f"data.name={cfg.name!r}: no such data set: use one of {sorted(SOURCES)}")
    devices = int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
    for count, what in ((devices, "devices"), (jax.process_count(), "processes")):
        if cfg.batch_size % count:
            raise UserError(
                f"data.batch_size={cfg.batch_size}: does not divide over {count} {what}: "
                "change it or the mesh"
            )
    return Loader(SOURCES[cfg.name](experiment), mesh, cfg.batch_size, cfg.prefetch)
