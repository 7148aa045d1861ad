# SPDX-License-Identifier: Apache-2.0
"""``m2jax video align``: segments of stored features or similarity maps, in VCSL's files."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from m2jax.cli import files

AT_ONCE = 32  # pairs whose maps are held together


def add_parser(subparsers: Any) -> None:
    """Declares the action."""
    parser = subparsers.add_parser(
        "align",
        help="find segments of pairs from stored features or similarity maps",
        description="Aligns pairs of videos by the classical methods of VCSL's benchmark, or by a "
        "trained detector, and "
        "writes predictions that `m2jax video eval` reads. Features lie one file per video, "
        "VIDEO.npy [frames, dim] with unit rows; maps one per pair, QUERY-REFERENCE.npy.",
        allow_abbrev=False,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--features", type=Path, metavar="DIR")
    source.add_argument("--maps", type=Path, metavar="DIR")
    parser.add_argument("--pairs", required=True, type=Path, metavar="CSV")
    parser.add_argument("--method", default="TN", help="HV, TN (default), DP, DTW or SPD")
    parser.add_argument("--detector", type=Path, metavar="DIR", help="for SPD: made by video train")
    parser.add_argument(
        "--keyframes",
        type=Path,
        metavar="DIR",
        help="align maps of keyframes, chosen by this training of ske or ssan (default: those that "
        "the detector was trained on); needs --features",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of the method (default: those of VCSL's benchmark of 2023-03)",
    )
    parser.add_argument(
        "--end-exclusive",
        action="store_true",
        help="segments end where the copy is over, as labels do; without it they end with its last "
        "frame, as the published methods do",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.json")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Aligns the pairs, writes the file."""
    import sys

    from m2jax.config import UserError
    from m2jax.dist.host import load_devices
    from m2jax.tasks.video import pattern, saved, segments

    files.check_parent(args.out, "--out")
    if args.detector or args.keyframes:
        load_devices()
    trained = saved.read(args.detector) if args.detector else None
    method = pattern.chosen(args.method, args.set, trained)
    part = saved.read(args.keyframes) if args.keyframes else trained
    if args.keyframes and part is not None and part.settings.window == 1:
        raise UserError(
            f"--keyframes {args.keyframes}: was trained on all frames: name a training of ske or "
            "ssan, or of spd with --window"
        )
    choose = pattern.Keyframes(part) if part is not None and part.settings.window > 1 else None
    pattern.check_windows(
        trained, choose, f"--detector {args.detector}", f"--keyframes {args.keyframes} keeps"
    )
    if choose is not None and args.maps:
        raise UserError(
            "--maps: keyframes are chosen by features: pass --features, or a detector that was "
            "trained with --window 1"
        )
    keys = segments.read_pairs(args.pairs)
    found: dict[str, list[list[int]]] = {}
    for first in range(0, len(keys), AT_ONCE):
        names = keys[first : first + AT_ONCE]
        boxes = _boxes(args, method, choose, names)
        found |= {name: one.tolist() for name, one in zip(names, boxes, strict=True)}
        print(f"\r{len(found):,}/{len(keys):,}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    files.write(args.out, lambda file: segments.write_segments(found, file))
    print(f"{args.out}: {sum(map(len, found.values())):,} segments of {len(found):,} pairs")
    return 0


def _boxes(args: argparse.Namespace, method: Any, choose: Any, names: Sequence[str]) -> list[Any]:
    """Segments of some pairs."""
    from m2jax.tasks.video import align, arrays, pattern

    if choose is None:
        if args.maps:
            maps = [arrays.read_map(args.maps, name) for name in names]
        else:
            maps = [arrays.map_of_features(args.features, name) for name in names]
        return align.align(method, maps, end_exclusive=args.end_exclusive)
    pairs = [arrays.features_of_pair(args.features, name) for name in names]
    spans = pattern.spans_of_features(method, choose, pairs)
    return [align.whole(own, end_exclusive=args.end_exclusive) for own in spans]
