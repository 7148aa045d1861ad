# SPDX-License-Identifier: Apache-2.0
"""Copied segments of similarity maps, by the classical methods of VCSL's benchmark."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from m2jax.config import UserError
from m2jax.tasks.video.dynamic import DynamicProgramming
from m2jax.tasks.video.hough import HoughVoting
from m2jax.tasks.video.maps import Boxes, Map, checked
from m2jax.tasks.video.network import TemporalNetwork
from m2jax.tasks.video.warping import TimeWarping

Aligner = Callable[[Sequence[Map]], list[Boxes]]

METHODS = MappingProxyType(
    {"HV": HoughVoting, "TN": TemporalNetwork, "DP": DynamicProgramming, "DTW": TimeWarping}
)
# What VCSL's table of 2023-03 was made with (ISC features, at one frame per second).
BENCHMARK: Mapping[str, Aligner] = MappingProxyType(
    {
        "HV": HoughVoting(min_sim=0.7, iou_thresh=0.9),
        "TN": TemporalNetwork(tn_max_step=10, tn_top_k=3, min_sim=0.3),
        "DP": DynamicProgramming(
            discontinue=9, min_sim=0.2, ave_sim=1.3, min_length=5, diagonal_thres=10
        ),
        "DTW": TimeWarping(discontinue=9, min_sim=0.3, min_length=5),
    }
)


def align(
    method: Aligner | str, maps: Sequence[np.ndarray], *, end_exclusive: bool = False
) -> list[Boxes]:
    """Segments of similarity maps.

    Args:
        method: a method with its settings, or the name of one with those of VCSL's benchmark.
        maps: similarities [query, reference], of any sizes; they stay as they are.
        end_exclusive: give where a segment is over, as labels do, and not its last frame, as the
            published methods do. Worth some points of F, so say which one a figure is of.

    Returns:
        Of each map [segments, 4]: query start, reference start, query end, reference end.

    Raises:
        UserError: an unknown name, or a map that is none.
    """
    if isinstance(method, str):
        if method not in BENCHMARK:
            raise UserError(f"method {method:.40}: unknown: use one of {', '.join(BENCHMARK)}")
        method = BENCHMARK[method]
    named = [checked(one, f"similarity map {number}") for number, one in enumerate(maps)]
    found = method(named)
    past = np.array([0, 0, 1, 1])
    return [boxes + past for boxes in found] if end_exclusive else found


def spans(method: Aligner | str, maps: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Segments of similarity maps, ends exclusive, as precise as the method gives them.

    Of each map [segments, 4] float64: parts of frames from a detector, whole frames from others.

    Raises:
        UserError: as ``align``.
    """
    precise = getattr(method, "spans", None)
    if precise is not None:
        return precise([checked(one, f"similarity map {n}") for n, one in enumerate(maps)])
    return [found.astype(np.float64) for found in align(method, maps, end_exclusive=True)]


def whole(spans: np.ndarray, *, end_exclusive: bool) -> Boxes:
    """Segments to the nearest frame; those that come to nothing are dropped.

    Args:
        spans: [segments, 4], ends exclusive.
        end_exclusive: as of ``align``.
    """
    boxes = np.round(spans).astype(np.int64).reshape(-1, 4)
    boxes = boxes[(boxes[:, 2:] > boxes[:, :2]).all(axis=1)]
    return boxes if end_exclusive else boxes - np.array([0, 0, 1, 1])


def with_settings(name: str, settings: Mapping[str, Any]) -> Aligner:
    """The method of that name with other settings than its defaults.

    Raises:
        UserError: an unknown name or setting, or a value that is no number of the right kind.
    """
    if name not in METHODS:
        raise UserError(f"method {name:.40}: unknown: use one of {', '.join(METHODS)}")
    kinds = {field.name: field.type for field in dataclasses.fields(METHODS[name])}
    for key, value in settings.items():
        if key not in kinds:
            raise UserError(f"{name}: {key:.40}: unknown setting: use one of {', '.join(kinds)}")
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not (whole and value >= 0 if kinds[key] == "int" else np.isfinite(value)):
            raise UserError(f"{name}: {key}={value}: no {kinds[key]}: give a number")
    if settings.get("tn_max_step", 1) < 1 or settings.get("tn_top_k", 1) < 1:
        raise UserError(f"{name}: tn_max_step and tn_top_k: must be at least 1")
    return METHODS[name](**settings)


def chosen(name: str, words: Sequence[str]) -> Aligner:
    """The method of that name as VCSL's benchmark sets it, but for settings ``NAME=VALUE``.

    Raises:
        UserError: an unknown name or setting, or a value that is no number of the right kind.
    """
    if name not in BENCHMARK:
        raise UserError(f"method {name:.40}: unknown: use one of {', '.join(BENCHMARK)}")
    settings = dataclasses.asdict(BENCHMARK[name])  # pyright: ignore[reportArgumentType]
    for word in words:
        key, equals, text = word.partition("=")
        try:
            settings[key] = int(text) if text.removeprefix("-").isdecimal() else float(text)
        except ValueError:
            raise UserError(f"{name}: {word:.40}: no setting: write NAME=NUMBER") from None
        if not equals:
            raise UserError(f"{name}: {word:.40}: no setting: write NAME=NUMBER")
    return with_settings(name, settings)
