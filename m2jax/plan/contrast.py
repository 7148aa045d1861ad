# SPDX-License-Identifier: Apache-2.0
"""What each form of the contrastive loss would hold and send in a run: the loss compiled alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from m2jax import config as config_lib
from m2jax.config import Experiment, UserError
from m2jax.dist.sharding import batch_sharding, replicated
from m2jax.dist.topology import Topology, uncached
from m2jax.losses.contrastive import contrastive_loss
from m2jax.losses.layout import TILED
from m2jax.plan import collectives, hlo, loops
from m2jax.plan.compile import OPTIONS, out_of_memory


class Cost(NamedTuple):
    """Of one loss over one pair of views, value and gradients, on one device."""

    impl: str
    temporaries: int | None  # bytes; None where the compiler refuses
    sent: float  # bytes
    note: str = ""  # why there is no number


def costs(experiment: Experiment, topology: Topology, mesh: Mesh) -> list[Cost]:
    """One row per form, for the batch, features, mesh and options of an experiment's loss.

    ``loss.contrastive.group`` is taken for the form that the run uses; the others choose their own.

    Args:
        experiment: the run.
        topology: the machine, its devices in the order of the mesh.
        mesh: where the rows lie.
    """
    impls = config_lib.choices(config_lib.Contrastive, "impl")
    return [_cost(impl, experiment, topology, mesh) for impl in impls]


def _cost(impl: str, experiment: Experiment, topology: Topology, mesh: Mesh) -> Cost:
    cfg = experiment.loss.contrastive

    def loss(image: jax.Array, text: jax.Array, scale: jax.Array, ids: jax.Array) -> jax.Array:
        return contrastive_loss(
            image,
            text,
            scale,
            bias=cfg.bias_init if cfg.form == "sigmoid" else None,
            impl=impl,
            mesh=mesh,
            group=(cfg.group or None) if impl == cfg.impl else None,
            ids=ids if cfg.mask_same_caption else None,
            label_smoothing=cfg.label_smoothing,
            wire_dtype=cfg.wire_dtype,
            tile=cfg.tile,
            kernel=cfg.kernel if impl in TILED else "xla",
        )

    places: Any = (batch_sharding(mesh), batch_sharding(mesh), replicated(mesh))
    rows = jax.ShapeDtypeStruct(
        (experiment.data.batch_size, experiment.model.out_dim), jnp.float32, sharding=places[0]
    )
    scale = jax.ShapeDtypeStruct((), jnp.float32, sharding=places[2])
    ids = jax.ShapeDtypeStruct(rows.shape[:1], jnp.int32, sharding=places[0])
    gradient = jax.jit(
        jax.value_and_grad(loss, argnums=(0, 1, 2)),
        in_shardings=(*places, places[0]),
        out_shardings=(places[2], places),
    )
    try:
        with uncached():
            lowered = gradient.lower(rows, rows, scale, ids)
            compiled = lowered.compile(OPTIONS[topology.chip.platform])
    except UserError as error:  # a form that this mesh or batch does not suit
        return Cost(impl, None, 0.0, str(error).splitlines()[0])
    except jax.errors.JaxRuntimeError as error:
        used = out_of_memory(str(error))
        if used is None and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Cost(impl, None, 0.0, f"needs {used / 2**30:,.0f} GiB" if used else "does not fit")
    module = hlo.parse(compiled.as_text() or "")
    found = collectives.collectives(loops.walk(module), topology, dict(mesh.shape))
    sent = sum(one.sent * one.times for one in found.values())
    analysis: Any = compiled.memory_analysis()
    return Cost(impl, analysis.temp_size_in_bytes, sent)
