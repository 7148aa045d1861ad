# SPDX-License-Identifier: Apache-2.0
"""``m2jax eval``: scores a model on a suite."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from m2jax.cli import files


def add_parser(subparsers: Any) -> None:
    """Declares the verb."""
    parser = subparsers.add_parser(
        "eval",
        help="score a model: zero-shot classification, retrieval, captions",
        description="Scores a model. Shares are between 0 and 1, CIDEr between 0 and 10.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model", required=True, help="a model or work directory, hf:OWNER/NAME, s3://..."
    )
    parser.add_argument(
        "--suite", default="emoji", help="emoji, emoji-scenes or emoji-validation (default: emoji)"
    )
    parser.add_argument("--data", default="", help="where the data sets are (default: the cache)")
    parser.add_argument("--languages", default="en,zh", help="comma-separated (default: en,zh)")
    parser.add_argument(
        "--hold-out-styles",
        default="",
        metavar="STYLE,...",
        help="emoji-validation: styles kept out of training (default: those of the model's run)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Scores, prints the table, writes the figures."""
    from m2jax import bundle
    from m2jax.config import UserError
    from m2jax.dist.host import load_devices
    from m2jax.eval import runner

    languages = tuple(part for part in args.languages.split(",") if part)
    if not languages:
        raise UserError("--languages: names no language: write en,zh")
    if args.json:
        files.check_parent(args.json, "--json")
    load_devices()
    held_out = tuple(part for part in args.hold_out_styles.split(",") if part)
    if not held_out and (saved := bundle.read_saved(args.model)) and saved.experiment:
        held_out = saved.experiment.data.hold_out_styles
    model, writer = runner.opened(args.model)
    metrics = runner.evaluate(
        model,
        suite=args.suite,
        data_dir=args.data,
        languages=languages,
        hold_out_styles=held_out,
        writer=writer,
    )
    if args.json:
        text = json.dumps(metrics, indent=1, sort_keys=True) + "\n"
        files.write(args.json, lambda file: file.write(text.encode()))
    return 0
