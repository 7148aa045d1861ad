# SPDX-License-Identifier: Apache-2.0
"""``m2jax video align``: segments of stored features or similarity maps, in VCSL's files."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from m2jax.cli import files

AT_ONCE = 32  # pairs whose maps are held together


def add_parser(subparsers: Any) -> None:
    """Declares the action."""
    parser = subparsers.add_parser(
        "align",
        help="find segments of pairs from stored features or similarity maps",
        description="Aligns pairs of videos by the classical methods of VCSL's benchmark, and "
        "writes predictions that `m2jax video eval` reads. Features lie one file per video, "
        "VIDEO.npy [frames, dim] with unit rows; maps one per pair, QUERY-REFERENCE.npy.",
        allow_abbrev=False,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--features", type=Path, metavar="DIR")
    source.add_argument("--maps", type=Path, metavar="DIR")
    parser.add_argument("--pairs", required=True, type=Path, metavar="CSV")
    parser.add_argument("--method", default="TN", help="HV, TN (default), DP or DTW")
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

    from m2jax.tasks.video import align, segments

    files.check_parent(args.out, "--out")
    method = align.chosen(args.method, args.set)
    keys = segments.read_pairs(args.pairs)
    found: dict[str, list[list[int]]] = {}
    for names, maps in _maps(args, keys):
        boxes = align.align(method, maps, end_exclusive=args.end_exclusive)
        found |= {name: one.tolist() for name, one in zip(names, boxes, strict=True)}
        print(f"\r{len(found):,}/{len(keys):,}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    files.write(args.out, lambda file: segments.write_segments(found, file))
    print(f"{args.out}: {sum(map(len, found.values())):,} segments of {len(found):,} pairs")
    return 0


def _maps(args: argparse.Namespace, keys: Sequence[str]) -> Iterator[tuple[Sequence[str], Any]]:
    """Names of some pairs at once, and their maps."""
    from m2jax.tasks.video import arrays

    for first in range(0, len(keys), AT_ONCE):
        names = keys[first : first + AT_ONCE]
        if args.maps:
            yield names, [arrays.read_map(args.maps, name) for name in names]
        else:
            yield names, [arrays.map_of_features(args.features, name) for name in names]
