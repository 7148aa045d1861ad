# SPDX-License-Identifier: Apache-2.0
"""What a trainer needs to know of an objective; heads and downstream work implement this."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax

from m2jax.models.params import Abstract, Params

Batch = Mapping[str, jax.Array]
Features = Mapping[str, jax.Array]  # floating point; first axis: rows, or rows x n
Metrics = Mapping[str, Any]  # scalar arrays; of a loss also CARRIED

# A loss may tell new values of parameters that are no matter of gradients (running statistics):
# under this name among its metrics, as a mapping to the top level of the tree. They must be frozen.
CARRIED = "carried"


@runtime_checkable  # the tests check types as they run
class Task(Protocol):
    """An objective over the parameters of one model."""

    model: Abstract  # graph, shapes and logical axes of every parameter

    def init(self, rng: jax.Array) -> Params:
        """Fresh parameters; jitted by the trainer with the shardings of ``model``."""
        ...

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Metrics]:
        """The scalar to minimise and what to log beside it; pure, differentiable in ``params``."""
        ...

    def batch_spec(self, batch_size: int) -> Mapping[str, jax.ShapeDtypeStruct]:
        """Shapes of a global batch: what the step is compiled for before any data is read."""
        ...

    def after_update(self, params: Params) -> Params:
        """Projection onto what parameters may be (a ceiling on scales); identity if none."""
        ...

    def frozen(self, name: str) -> bool:
        """Whether the parameter of this dotted name is left as it is."""
        ...

    def layer_scales(self, decay: float) -> Mapping[str, Any]:
        """Factors on learning rates by dotted name, ``decay`` from each layer to the one below."""
        ...


@runtime_checkable
class TwoPartTask(Task, Protocol):
    """A task whose loss is ``contrast`` of ``encode``: what ``train.accumulate`` needs."""

    def encode(self, params: Params, batch: Batch, rng: jax.Array) -> Features:
        """What the loss must know of each row, from that row alone."""
        ...

    def contrast(
        self, params: Params, features: Features, batch: Batch
    ) -> tuple[jax.Array, Metrics]:
        """The scalar to minimise and what to log, from the features of all rows."""
        ...
