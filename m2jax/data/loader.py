# SPDX-License-Identifier: Apache-2.0
"""Global batches on the mesh, in an order that depends on the seed and the position alone.

A source gives one batch for one index, without state; Grain prepares batches ahead, in threads or
worker processes, and puts them on the devices. Each process makes its own rows of every global
batch, so a run may go on with other processes and workers: what a checkpoint keeps is the index.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping
from typing import Any

import grain
import jax
import numpy as np
from absl import flags
from grain.experimental import ThreadPrefetchIterDataset
from jax.sharding import Mesh

from m2jax.config import Data, Experiment, UserError
from m2jax.data.source import PART, SKIPPED, HostBatch, Rows, Source
from m2jax.data.words import WithWords
from m2jax.dist.sharding import batch_sharding, batch_shards

Assets = Mapping[str, Any]  # tokenizer and preprocessing, as checkpoints keep them


def _emoji(experiment: Experiment, assets: Assets | None) -> Source:
    from m2jax.data.emoji.batches import EmojiBatches

    return EmojiBatches.of(experiment, assets)


def _files(experiment: Experiment, assets: Assets | None) -> Source:
    from m2jax.data.files import pair_batches

    return pair_batches(experiment, assets)


def _scenes(experiment: Experiment, assets: Assets | None) -> Source:
    from m2jax.data.emoji.scenes import SceneBatches

    return SceneBatches.of(experiment, assets)


# By data.name. The second argument is what a run takes over from the model it starts from.
SOURCES: dict[str, Callable[[Experiment, Assets | None], Source]] = {
    "emoji": _emoji,
    "emoji-scenes": _scenes,
    "tsv": _files,
    "tars": _files,
    "shards": _files,
    "tfds": _files,
    "mixture": _files,
}


class Loader:
    """An endless iterator of global batches.

    Args:
        source: where batches come from.
        mesh: where they go; rows lie over its batch axes.
        batch_size: rows of a global batch.
        prefetch: batches prepared ahead.
        workers: processes that prepare them; 0: ``prefetch`` threads of this one.
        device_prefetch: batches put on the devices ahead.
    """

    def __init__(
        self,
        source: Source,
        mesh: Mesh,
        batch_size: int,
        prefetch: int,
        *,
        workers: int = 0,
        device_prefetch: int = 0,
    ) -> None:
        self.assets = source.assets
        self.parts: tuple[str, ...] = getattr(source, "parts", ())
        self._by_place: bool = getattr(source, "by_place", False)
        self._batch_size = batch_size
        self.counts = collections.Counter[str]()  # rows of each part, and "skipped", so far
        self._sharding = batch_sharding(mesh)
        share = batch_size // jax.process_count()
        first = jax.process_index() * share
        self._rows = Rows(source, slice(first, first + share))
        self._prefetch, self._workers, self._ahead = prefetch, workers, device_prefetch
        self._next_index = 0
        self._iterator: Any = None

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> dict[str, jax.Array]:
        if self._iterator is None:
            self._iterator = iter(self._batches())
        batch, notes = next(self._iterator)
        self._next_index += 1
        self._count(notes)
        return batch

    def _batches(self) -> grain.IterDataset:
        """Batches from the next index on, as pairs of arrays for the devices and for the log."""
        batches = grain.MapDataset.range(self._next_index, 2**31 - 1).map(self._rows)
        threads = 0 if self._workers else self._prefetch
        found = batches.to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
        )
        if self._workers:
            if not flags.FLAGS.is_parsed():  # Grain's workers read absl's flags
                flags.FLAGS.mark_as_parsed()
            each = max(1, self._prefetch // self._workers)
            options = grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=each)
            found = found.mp_prefetch(options)
        return ThreadPrefetchIterDataset(found.map(self._put), prefetch_buffer_size=self._ahead)

    def _put(self, batch: HostBatch) -> tuple[dict[str, jax.Array], HostBatch]:
        """Starts the transfer of a batch to the devices."""
        notes = {name: batch[name] for name in (PART, SKIPPED) if name in batch}
        arrays = {
            name: jax.make_array_from_process_local_data(self._sharding, rows)
            for name, rows in batch.items()
            if name not in notes
        }
        return arrays, notes

    def _count(self, notes: HostBatch) -> None:
        if PART in notes:
            rows = np.bincount(notes[PART], minlength=len(self.parts))
            self.counts.update(dict(zip(self.parts, map(int, rows), strict=True)))
        if SKIPPED in notes:
            self.counts[SKIPPED] += int(notes[SKIPPED].sum())

    def get_state(self) -> dict[str, Any]:
        """Where the loader is, JSON-able; ``counts`` are of this process's rows."""
        return {
            "next_index": self._next_index,
            "batch_size": self._batch_size,
            "counts": dict(self.counts),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to where another loader of the same experiment was.

        Raises:
            UserError: that one's batches were of another size, and no whole number of ours has its
                rows, or the set's order depends on the size.
        """
        self.close()
        self._next_index = self._converted(state)
        self.counts = collections.Counter(state.get("counts", {}))

    def _converted(self, state: dict[str, Any]) -> int:
        """The index of the batch that begins where the saved one did."""
        index, size = int(state["next_index"]), int(state.get("batch_size", self._batch_size))
        if size == self._batch_size:
            return index
        if self._by_place and index * size % self._batch_size == 0:
            return index * size // self._batch_size
        why = f"{index * size} rows were taken" if self._by_place else "the order depends on it"
        raise UserError(
            f"data.batch_size={self._batch_size}: this run began with {size}, and {why}: rows "
            f"would come twice or never: go on with {size}, or begin another run with --init"
        )

    def close(self) -> None:
        """Stops preparing batches."""
        if self._iterator is not None:
            self._iterator.close()
        self._iterator = None


def make_loader(experiment: Experiment, mesh: Mesh, assets: Assets | None = None) -> Loader:
    """The training batches of an experiment.

    Args:
        experiment: the run.
        mesh: where batches go.
        assets: tokenizer and preprocessing of the model that the run starts from, if it does.

    Raises:
        UserError: an unknown data set, or a batch the devices or processes do not divide.
    """
    cfg = experiment.data
    if cfg.name not in SOURCES:
        raise UserError(f"data.name={cfg.name!r}: no such data set: use one of {sorted(SOURCES)}")
    devices = batch_shards(mesh.shape)
    for count, what in ((devices, "devices"), (jax.process_count(), "processes")):
        if cfg.batch_size % count:
            raise UserError(
                f"data.batch_size={cfg.batch_size}: does not divide over {count} {what}: "
                "change it or the mesh"
            )
    _refuse_shared_rows(mesh, cfg.batch_size)
    _check_counts(cfg)
    source = SOURCES[cfg.name](experiment, assets)
    if experiment.loss.masked_text.weight:
        source = WithWords(source)
    return Loader(
        source,
        mesh,
        cfg.batch_size,
        cfg.prefetch,
        workers=cfg.workers,
        device_prefetch=cfg.device_prefetch,
    )


def _refuse_shared_rows(mesh: Mesh, batch_size: int) -> None:
    """Every row of a batch must lie in one process, and as many in each.

    Raises:
        UserError: fewer shards of the batch than processes, or a shard on two of them. Both would
            feed that shard, each with other rows: a smaller batch whose copies disagree.
    """
    rows_of: dict[int, set[int]] = {}
    places = batch_sharding(mesh).devices_indices_map((batch_size,))
    for device, (rows,) in places.items():
        rows_of.setdefault(device.process_index, set()).update(range(*rows.indices(batch_size)))
    if any(len(rows) * len(rows_of) != batch_size for rows in rows_of.values()):
        shards = batch_shards(mesh.shape)
        raise UserError(
            f"mesh: {shards} shards of the batch do not lie whole in {len(rows_of)} processes: "
            "make mesh.replica x data x fsdp a multiple of the processes, and mesh.model a "
            "divisor of the devices of one"
        )


def _check_counts(cfg: Data) -> None:
    for key in ("prefetch", "workers", "device_prefetch"):
        if getattr(cfg, key) < 0:
            raise UserError(f"data.{key}={getattr(cfg, key)}: must be 0 or more: change it")
