# SPDX-License-Identifier: Apache-2.0
"""``m2jax convert import``: a model in somebody else's format becomes a model folder of ours.

Each family of models is one module with a ``read(request) -> Imported``; the rest, from the file's
bytes to the folder, is the same for all.
"""

from __future__ import annotations

import importlib
import math
import os
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from m2jax import architectures, config_dual
from m2jax import config as config_lib
from m2jax.checkpoint import folder
from m2jax.checkpoint.convert import check as check_lib
from m2jax.checkpoint.convert import hf_config, json_files, open_clip_config, weights
from m2jax.config import UserError
from m2jax.config_dual import Architecture
from m2jax.data.image import Preprocess
from m2jax.data.text import Tokenizer
from m2jax.dist.mesh import make_mesh
from m2jax.dist.sharding import AxisRules
from m2jax.models import params as params_lib
from m2jax.models.params import Abstract, Params

# Name of a family, with which its architectures' names begin -> the module that reads it.
FAMILIES: Mapping[str, str] = types.MappingProxyType(
    {
        "m2-encoder": "m2jax.checkpoint.convert.m2_inward",
        **dict.fromkeys(config_dual.FAMILIES, "m2jax.checkpoint.convert.dual_inward"),
    }
)
DTYPES = ("float32", "bfloat16", "float16")


class Request(NamedTuple):
    """What the caller asked for."""

    weights: weights.Weights
    arch: str  # a name, or a .json file
    tokenizer: Path | None  # the folder to read it from; None: that of the weights
    allow_missing: tuple[str, ...]
    dtype: str  # of the parameters; "" keeps the file's
    mesh: Mesh | None  # None: as many devices of this machine as divide the width


class Imported(NamedTuple):
    """A model, read and placed."""

    config: Any  # resolved config of the model
    params: Params
    tokenizer: Tokenizer | None
    preprocess: Preprocess
    notes: tuple[str, ...]  # what the user should know, one line each
    check: Callable[[], list[check_lib.Row]]  # compares with the source file


class Report(NamedTuple):
    """What an import did."""

    config: Any
    notes: tuple[str, ...]
    checks: tuple[check_lib.Row, ...]  # empty when the check was left out


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    arch: str = "",
    tokenizer: str | os.PathLike[str] | None = None,
    check: bool = True,
    allow_missing: Sequence[str] = (),
    dtype: str = "",
    mesh: Mesh | None = None,
) -> Report:
    """Imports a checkpoint and writes a model folder that ``load`` reads.

    Args:
        src: the weight file (safetensors, or of ``torch.save``), or a folder that holds one.
        dst: the model folder to make.
        arch: name of the architecture, or a JSON file with the release's own config keys; "" goes
            by the config file beside the weights.
        tokenizer: folder with the tokenizer's file; that of ``src`` if not given. Without one the
            model loads and only ``tokenize`` is refused.
        check: compare embeddings of a built-in probe set before and after.
        allow_missing: names, or patterns with ``*``, of tensors that may be missing or left over.
            What is missing gets initial values, as in the release.
        dtype: float32, bfloat16 or float16 for the parameters; "" keeps the file's.
        mesh: where parameters are laid out; the devices of this machine if not given.

    Raises:
        UserError: anything in the file or the arguments that cannot work; nothing is written.
        CheckFailed: the embeddings differ; nothing is written.
    """
    folder.check_absent(Path(dst))
    imported = read(
        Path(src),
        arch=arch,
        tokenizer=None if tokenizer is None else Path(tokenizer),
        allow_missing=allow_missing,
        dtype=dtype,
        mesh=mesh,
    )
    rows = imported.check() if check else []
    if not all(row.passed for row in rows):
        raise check_lib.CheckFailed(rows)
    folder.write(
        Path(dst),
        imported.config,
        imported.params,
        tokenizer=imported.tokenizer.to_dict() if imported.tokenizer else None,
        preprocess=imported.preprocess.to_dict(),
    )
    return Report(imported.config, imported.notes, tuple(rows))


def read(
    src: Path,
    *,
    arch: str = "",
    tokenizer: Path | None = None,
    allow_missing: Sequence[str] = (),
    dtype: str = "",
    mesh: Mesh | None = None,
) -> Imported:
    """Reads and places a model; arguments and errors are those of ``convert``."""
    arch = arch or detect(src if src.is_dir() else src.parent) or ""
    if not arch:
        raise UserError(f"{src}: no config file beside the weights tells what it is: add --arch")
    module = importlib.import_module(_family(arch))
    if dtype and dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r}: no such type: use one of {', '.join(DTYPES)}")
    found = weights.read(src)
    return module.read(Request(found, arch, tokenizer, tuple(allow_missing), dtype, mesh))


def detect(directory: Path) -> str | None:
    """The ``arch`` of a folder that holds weights and a config file that tells of them.

    Returns:
        ``None`` where the folder is no model that ``convert`` knows.

    Raises:
        UserError: a config file is damaged.
    """
    values = json_files.read(directory / "config.json")
    if "encoder_embed_dim" in values:
        return str(directory / "config.json")
    return _family_of(values) or _family_of(json_files.read(directory / "open_clip_config.json"))


def _family_of(values: Mapping[str, Any]) -> str | None:
    """The family of a config of transformers or open_clip, by the one key that tells it."""
    if open_clip_config.is_ours(values):
        return open_clip_config.family(values)
    return hf_config.FAMILIES.get(str(values.get("model_type")))


def layout(model: Abstract, width: int, mesh: Mesh | None) -> Params:
    """A sharding for every parameter: on ``mesh``, or on this machine's devices.

    Args:
        model: the parameters.
        width: what the devices must divide, where they are chosen here.
        mesh: where to lay them out, if it was given.
    """
    if mesh is None:
        devices = jax.devices()
        used = math.gcd(width, len(devices))
        if used == 1:
            return jax.tree.map(lambda _: SingleDeviceSharding(devices[0]), model.params)
        mesh = make_mesh(config_lib.Mesh(data=1, fsdp=used), devices[:used])
    return params_lib.shardings(model, mesh, AxisRules())


def fresh(cfg: Architecture, places: Params, names: Sequence[str]) -> Mapping[str, jax.Array]:
    """Initial values of a few parameters; the compiler leaves the others out."""
    wanted = params_lib.flatten(places)

    def initial() -> dict[str, jax.Array]:
        made = params_lib.flatten(params_lib.initialise(cfg, jax.random.key(0)))
        return {name: made[name] for name in names}

    return jax.jit(initial, out_shardings={name: wanted[name] for name in names})()


def narrowest(tensors: Mapping[str, np.ndarray], where: str) -> str:
    """The narrowest type that holds every tensor exactly.

    Raises:
        UserError: a tensor is of whole numbers, or all that holds them is float64.
    """
    dtypes = {name: tensor.dtype.newbyteorder("=") for name, tensor in tensors.items()}
    dtype = next(iter(dtypes.values()), np.dtype(jnp.bfloat16))
    for name, kind in dtypes.items():
        if not jnp.issubdtype(kind, jnp.floating):
            raise UserError(f"{where}: {name} is of type {kind}: weights are fractions")
        dtype = jnp.promote_types(dtype, kind)
    if dtype.name not in DTYPES:
        raise UserError(f"{where}: holds {dtype.name}: say --dtype float32 to round it")
    return dtype.name


def _family(arch: str) -> str:
    """The module that reads an architecture."""
    if arch.endswith(".json"):
        return FAMILIES[_family_of(json_files.read(Path(arch))) or "m2-encoder"]
    for name, module in FAMILIES.items():
        if arch == name or arch.startswith(f"{name}-"):
            return module
    raise UserError(
        f"--arch {arch}: no such architecture: use a .json file of the release, one of "
        f"{', '.join(architectures.ARCHITECTURES)}, {', '.join(config_dual.FAMILIES)}"
    )
