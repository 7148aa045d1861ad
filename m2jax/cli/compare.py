# SPDX-License-Identifier: Apache-2.0
"""``m2jax compare``: which differences between two evaluations are real."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from m2jax.cli import files


def add_parser(subparsers: Any) -> None:
    """Declares the verb."""
    parser = subparsers.add_parser(
        "compare",
        help="say which differences between two evaluations are real",
        description="Compares two files of `m2jax eval --json`. Figures whose examples lie beside "
        "them (FILE.examples.npz) are compared example by example, by an exact or permutation test "
        "of their differences; p-values are corrected for the number of figures.",
        allow_abbrev=False,
    )
    parser.add_argument("a", type=Path, metavar="A.json")
    parser.add_argument("b", type=Path, metavar="B.json")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the comparison here")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compares, prints the table, writes the file."""
    from m2jax.eval import compare

    if args.json:
        files.check_parent(args.json, "--json")
    found = compare.compare(compare.read(args.a), compare.read(args.b))
    print(compare.table(found))
    if args.json:
        rows = {
            d.key: {
                **{"a": d.a, "b": d.b, "low": d.low, "high": d.high, "p": d.p},
                **{"paired": d.paired, "real": d.real},
            }
            for d in found
        }
        text = json.dumps(rows, indent=1, sort_keys=True) + "\n"
        files.write(args.json, lambda file: file.write(text.encode()))
    return 0
