# SPDX-License-Identifier: Apache-2.0
"""``m2jax reid``: re-identification sets in their published layouts."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from m2jax.cli import files


def add_parser(subparsers: Any) -> None:
    """Declares the verb."""
    parser = subparsers.add_parser("reid", help="re-identification: mAP and CMC of a model")
    parts = parser.add_subparsers(dest="part", required=True, metavar="PART")
    measure = parts.add_parser(
        "eval",
        help="mAP and CMC on Market-1501, CUHK03 or MSMT17",
        description="Embeds query and gallery with a model and scores them: of each query's own "
        "identity the images by its own camera are left out.",
        allow_abbrev=False,
    )
    measure.add_argument("--model", required=True, help="whatever m2jax embed takes")
    measure.add_argument("--data", required=True, type=Path, metavar="DIR", help="the unpacked set")
    measure.add_argument("--layout", required=True, help="market1501, cuhk03 or msmt17")
    measure.add_argument("--batch-size", type=int, default=64, help="images at once")
    measure.add_argument(
        "--rerank", action="store_true", help="k-reciprocal re-ranking (20, 6, 0.3) too"
    )
    measure.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    measure.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Reads, embeds, scores and prints."""
    from m2jax import bundle
    from m2jax.config import UserError
    from m2jax.dist.host import load_devices
    from m2jax.tasks.reid import evaluate, readers

    if args.layout not in readers.READERS:
        raise UserError(f"--layout {args.layout}: use one of {', '.join(readers.READERS)}")
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: must be at least 1")
    if args.json:
        files.check_parent(args.json, "--json")
    data = readers.READERS[args.layout](args.data)
    load_devices()
    model = bundle.load(args.model)

    def say(done: int, total: int) -> None:
        print(f"\r{done:,}/{total:,}", end="", file=sys.stderr, flush=True)

    found = evaluate.evaluate(model, data, batch=args.batch_size, rerank=args.rerank, say=say)
    print(file=sys.stderr)
    for name, each in found.items():
        ranks = ", ".join(f"R{r} {each[f'r{r}']:.4f}" for r in evaluate.RANKS if f"r{r}" in each)
        print(f"{name}: mAP {each['map']:.4f}, {ranks} over {each['queries']:,} queries")
    if args.json:
        text = json.dumps(found, indent=1) + "\n"
        files.write(args.json, lambda file: file.write(text.encode()))
    return 0
