# SPDX-License-Identifier: Apache-2.0
"""``m2jax convert import|export``: models in and out of other formats."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from m2jax.cli.terminal import printable

CHECK_FAILED = 4


def add_parser(subparsers: Any) -> None:
    """Declares the verb."""
    parser = subparsers.add_parser(
        "convert",
        help="bring a model in from another format, or hand one out",
        description="Converts models. A file from outside is read without running anything in it.",
        allow_abbrev=False,
    )
    ways = parser.add_subparsers(dest="way", required=True, metavar="import|export")
    _add_import(ways)
    _add_export(ways)


def _add_import(ways: Any) -> None:
    parser = ways.add_parser(
        "import",
        help="make a model folder of a checkpoint",
        description="Makes a model folder of a checkpoint and checks it against the file's own "
        "embeddings; exit code 4 when they differ.",
        allow_abbrev=False,
    )
    parser.add_argument("src", type=Path, metavar="SRC", help="weight file, or a folder with one")
    parser.add_argument("dst", type=Path, metavar="DST", help="model folder to make")
    parser.add_argument(
        "--arch",
        default="",
        metavar="NAME|FILE.json",
        help="m2-encoder-0.4b, -1b, -10b, clip, siglip, chinese-clip, or the release's config file "
        "(default: the one beside the weights)",
    )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="release folder (default: that of SRC)"
    )
    parser.add_argument("--no-check", action="store_true", help="do not compare embeddings")
    parser.add_argument(
        "--allow-missing",
        nargs="+",
        default=[],
        action="extend",
        metavar="NAME",
        help="tensors (or patterns with *) that may be missing or left over",
    )
    parser.add_argument(
        "--dtype",
        default="",
        choices=("float32", "bfloat16", "float16"),
        help="of the parameters (default: the file's)",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run_import)


def _add_export(ways: Any) -> None:
    parser = ways.add_parser(
        "export",
        help="write a model in another format",
        description="Writes a model in another format.",
        allow_abbrev=False,
    )
    parser.add_argument("src", type=Path, metavar="SRC", help="a model or work directory")
    parser.add_argument("dst", type=Path, metavar="DST", help="folder to make")
    parser.add_argument(
        "--format",
        required=True,
        metavar="NAME",
        help="m2-torch, or hf, open-clip for the CLIP family",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run_export)


def run_import(args: argparse.Namespace) -> int:
    """Imports; prints what was done and the check's table."""
    from m2jax.checkpoint.convert import check, inward

    try:
        report = inward.convert(
            args.src,
            args.dst,
            arch=args.arch,
            tokenizer=args.tokenizer,
            check=not args.no_check,
            allow_missing=args.allow_missing,
            dtype=args.dtype,
        )
    except check.CheckFailed as failed:
        print(check.table(failed.rows))
        print(f"m2jax: error: {args.src}: {failed}", file=sys.stderr)
        return CHECK_FAILED
    for note in report.notes:
        print(printable(note))
    print(check.table(report.checks) if report.checks else "not checked")
    print(args.dst)
    return 0


def run_export(args: argparse.Namespace) -> int:
    """Exports."""
    from m2jax import bundle
    from m2jax.checkpoint.convert import outward

    outward.check(args.dst, format=args.format)  # before a model is loaded in vain
    outward.export(bundle.load(args.src), args.dst, format=args.format)
    print(args.dst)
    return 0
