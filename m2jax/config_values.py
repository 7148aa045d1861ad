# SPDX-License-Identifier: Apache-2.0
"""What the settings of ``config.py`` may be, and the reader that holds files to it."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any


class UserError(Exception):
    """Bad input. The message is one line: what is wrong, where, how to mend it (exit code 2)."""


# Policies of ``model.remat``, and what the backward pass recomputes under each.
REMAT: Mapping[str, str] = types.MappingProxyType(
    {
        "none": "nothing",
        "products": "what is no matrix product with a weight, and the down projection",
        "attention": "the same, and the up projection of the feed-forward",
        "offload": "as attention; what is kept waits in the host's memory",
        "dots": "what is no matrix product with a weight",
        "full": "all of a layer but its input",
    }
)

# Forms of ``model.attention``: the same function, computed differently.
ATTENTION: Mapping[str, str] = types.MappingProxyType(
    {
        "batch": "the whole batch at once",
        "sample": "one sample at a time, which stays in a CPU's cache",
        "xla": "the whole batch by jax.nn.dot_product_attention",
        "cudnn": "one kernel of cuDNN's: NVIDIA GPUs, in bfloat16 or float16",
    }
)


_CHOICES: Mapping[tuple[str, str], tuple[str, ...]] = types.MappingProxyType(
    {
        ("Model", "init"): ("torch", "scaled"),
        ("Model", "dtype"): ("bfloat16", "float32", "float64"),
        ("Model", "param_dtype"): ("bfloat16", "float16", "float32", "float64"),
        ("Model", "attention"): tuple(ATTENTION),
        ("Model", "remat"): tuple(REMAT),
        ("Model", "products"): ("", "int8", "fp8"),
        ("Optim", "name"): ("adamw", "adafactor", "lion", "muon"),
        ("Data", "unreadable"): ("error", "skip"),
        ("Part", "kind"): ("tsv", "tars"),
        ("Finetune", "freeze"): ("", "image", "text"),
        ("Finetune", "heads"): ("keep", "fresh"),
        ("Optim", "schedule"): ("cosine", "linear", "constant"),
        ("Train", "accumulation"): ("exact", "detach"),
        ("Contrastive", "form"): ("softmax", "sigmoid"),
        ("Caption", "patches"): ("all", "high", "low", "random"),
        ("MaskedImage", "patches"): ("high", "low", "random"),
        ("MaskedImage", "target"): ("pixels", "tokens"),
        ("VisualTokenizer", "target"): ("features", "pixels"),
        ("Loss", "joint_vl"): ("split", "A", "B"),
        ("Contrastive", "kernel"): ("xla", "pallas"),
        ("Contrastive", "wire_dtype"): ("", "bfloat16", "float16", "float32"),
        ("Contrastive", "impl"): (
            "dense",
            "local",
            "chunked",
            "ring",
            "grid",
            "hierarchical",
            "grouped",
        ),
    }
)


# Least value, and the one that is too much already; numbers outside crash or divide by zero later.
_RANGES: Mapping[tuple[str, str], tuple[float, float | None]] = types.MappingProxyType(
    {
        **{("Train", key): (1, None) for key in ("steps", "log_every", "accumulate")},
        **{("Data", key): (1, None) for key in ("batch_size", "views")},
        **{("Optim", key): (0, 1) for key in ("b1", "b2", "ema")},
        **{("Model", key): (0, 1) for key in ("drop_path", "patch_drop")},
        **{("Contrastive", key): (1e-6, None) for key in ("scale_init", "scale_max")},
        **{(name, "ratio"): (0, 1) for name in ("MaskedText", "MaskedTokens")},
        **{
            (name, "positions"): (1, None) for name in ("MaskedImage", "MaskedText", "MaskedTokens")
        },
        **{("VisualTokenizer", key): (1, None) for key in ("codes", "code_dim", "decoder_layers")},
        **{("VisualTokenizer", key): (0, None) for key in ("width", "heads", "encoder_layers")},
        ("Model", "unroll"): (1, None),
        ("Contrastive", "tile"): (1, None),
        ("Contrastive", "group"): (0, None),
    }
)


def choices(cls: type, key: str) -> tuple[str, ...]:
    """Values that the field ``key`` of a config dataclass may take; none where any may."""
    return _CHOICES.get((cls.__name__, key), ())


def from_mapping(cls: type, values: Any, where: str) -> Any:
    """Builds a config dataclass from nested mappings, refusing what does not fit.

    Raises:
        UserError: an unknown key, a value of the wrong type or out of its choices.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: expected a group of keys, found {type(values).__name__}")
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise UserError(f"{where}.{unknown[0]}: no such key: use one of {', '.join(hints)}")
    built = {k: _value(cls, k, hints[k], v, f"{where}.{k}") for k, v in values.items()}
    return cls(**built)


def _value(cls: type, key: str, hint: Any, value: Any, where: str) -> Any:
    """One field's value, checked against its annotation and its choices."""
    if dataclasses.is_dataclass(hint):
        return from_mapping(typing.cast(type, hint), value, where)
    kind = typing.get_origin(hint) or hint
    if kind is tuple and isinstance(value, (list, tuple)):
        item = typing.get_args(hint)[0]
        if not dataclasses.is_dataclass(item):
            return tuple(value)
        built = (from_mapping(item, v, f"{where}[{i}]") for i, v in enumerate(value))  # type: ignore[arg-type]
        return tuple(built)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is float and isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}={value}: not a finite number: mend the config")
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"{where}={value!r}: not of type {kind.__name__}: mend the config")
    low, high = _RANGES.get((cls.__name__, key), (None, None))
    if (low is not None and value < low) or (high is not None and value >= high):
        bound = f"at least {low}" + ("" if high is None else f" and below {high}")
        raise UserError(f"{where}={value}: must be {bound}: mend the config")
    allowed = choices(cls, key)
    if allowed and value not in allowed:
        raise UserError(f"{where}={value!r}: no such choice: use one of {', '.join(allowed)}")
    return value
