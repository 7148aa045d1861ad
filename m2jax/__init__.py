# SPDX-License-Identifier: Apache-2.0
"""Bilingual image-text pretraining in JAX, from a laptop to TPU pods.

The public names below are looked up when they are first used, so ``import m2jax`` loads neither jax
nor any device.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from m2jax.bundle import Bundle, create_model, list_models, load
    from m2jax.checkpoint.convert.inward import convert
    from m2jax.checkpoint.convert.outward import export
    from m2jax.config import Experiment
    from m2jax.config_files import load_config
    from m2jax.config_values import UserError
    from m2jax.data.loader import make_loader
    from m2jax.dist.bootstrap import start
    from m2jax.dist.mesh import make_mesh
    from m2jax.dist.sharding import AxisRules
    from m2jax.losses.contrastive import contrastive_loss
    from m2jax.train.step import make_step
    from m2jax.train.task import Task

__version__ = "0.1.0"

_HOME = {  # public name -> the module that defines it
    "AxisRules": "m2jax.dist.sharding",
    "Bundle": "m2jax.bundle",
    "Experiment": "m2jax.config",
    "Task": "m2jax.train.task",
    "UserError": "m2jax.config_values",
    "contrastive_loss": "m2jax.losses.contrastive",
    "convert": "m2jax.checkpoint.convert.inward",
    "create_model": "m2jax.bundle",
    "export": "m2jax.checkpoint.convert.outward",
    "list_models": "m2jax.bundle",
    "load": "m2jax.bundle",
    "load_config": "m2jax.config_files",
    "make_loader": "m2jax.data.loader",
    "make_mesh": "m2jax.dist.mesh",
    "make_step": "m2jax.train.step",
    "start": "m2jax.dist.bootstrap",
}

__all__ = [
    "AxisRules",
    "Bundle",
    "Experiment",
    "Task",
    "UserError",
    "__version__",
    "contrastive_loss",
    "convert",
    "create_model",
    "export",
    "list_models",
    "load",
    "load_config",
    "make_loader",
    "make_mesh",
    "make_step",
    "start",
]


def __getattr__(name: str) -> Any:
    """Imports the module of a public name at its first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'm2jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
