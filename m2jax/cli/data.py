# SPDX-License-Identifier: Apache-2.0
"""``m2jax data build``: makes the data sets that training reads."""

from __future__ import annotations

import argparse
from typing import Any

from m2jax.cli import build_shards


def add_parser(subparsers: Any) -> None:
    """Declares the verb and its data sets."""
    parser = subparsers.add_parser("data", help="build data sets", allow_abbrev=False)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    build = actions.add_parser("build", help="build a data set", allow_abbrev=False)
    sets = build.add_subparsers(dest="dataset", required=True, metavar="DATASET")
    emoji = sets.add_parser(
        "emoji",
        help="drawings by seven vendors with names and keywords in English and Chinese",
        allow_abbrev=False,
    )
    emoji.add_argument("--dir", default="", help="where to (default: $M2JAX_DATA or the cache)")
    emoji.add_argument("--force", action="store_true", help="build again even if it is there")
    emoji.add_argument("--debug", action="store_true", help="show the traceback of an error")
    emoji.set_defaults(run=run)
    build_shards.add_parser(sets)


def run(args: argparse.Namespace) -> int:
    """Builds, and says where it lies."""
    from m2jax.data import emoji

    print(emoji.ensure(emoji.default_directory(args.dir), force=args.force))
    return 0
