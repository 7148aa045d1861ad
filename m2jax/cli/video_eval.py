# SPDX-License-Identifier: Apache-2.0
"""``m2jax video eval``: VCSL's scores of predicted segments."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from m2jax.cli import files


def add_parser(subparsers: Any) -> None:
    """Declares the action."""
    parser = subparsers.add_parser(
        "eval",
        help="score predicted segments as VCSL does",
        description="Scores predicted segments as VCSL's evaluation does: precision and recall of "
        "each pair of videos, then their averages. Files are JSON, {'QUERY-REFERENCE': [[query "
        "start, reference start, query end, reference end], ...]}. Labels end where the copy is "
        "over; methods that give the last frame of a copy lose about 5 points of F by it.",
        allow_abbrev=False,
    )
    parser.add_argument("--labels", required=True, type=Path, metavar="FILE")
    parser.add_argument("--predictions", required=True, type=Path, metavar="FILE")
    parser.add_argument(
        "--pairs",
        type=Path,
        metavar="CSV",
        help="pairs of the split, query_id,reference_id (default: all that are labelled or "
        "predicted); those without labels are negatives",
    )
    parser.add_argument(
        "--missing",
        choices=("error", "empty"),
        default="error",
        help="pairs without a prediction: an error (default, as VCSL has it), or none found",
    )
    parser.add_argument("--sets", type=Path, metavar="JSON", help="query sets, for macro figures")
    parser.add_argument("--split", default="test", help="the split of --sets (default: test)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Reads, scores, prints, writes."""
    from m2jax.tasks.video import protocol, segments

    if args.json:
        files.check_parent(args.json, "--json")
    labels = segments.read_segments(args.labels, forward=False)
    predictions = segments.read_segments(args.predictions, forward=True)
    pairs = segments.read_pairs(args.pairs) if args.pairs else None
    sets = segments.read_query_sets(args.sets, args.split) if args.sets else None
    found = protocol.evaluate(
        labels, predictions, pairs=pairs, query_sets=sets, missing=args.missing
    )
    for name, value in found.items():
        print(f"{name:16} {value:,}" if isinstance(value, int) else f"{name:16} {value:.4f}")
    if args.json:
        finite = {k: None if math.isnan(v) else v for k, v in found.items()}  # JSON has no nan
        text = json.dumps(finite, indent=1) + "\n"
        files.write(args.json, lambda file: file.write(text.encode()))
    return 0
