# SPDX-License-Identifier: Apache-2.0
"""``m2jax plan``: whether a run fits a machine, what it sends and how fast it can be."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from m2jax.cli import files

DOES_NOT_FIT = 3


def add_parser(subparsers: Any) -> None:
    """Declares the verb."""
    parser = subparsers.add_parser(
        "plan",
        help="compile the real training step for a machine that is not here, and account for it",
        description=(
            "Compiles the training step of a config for a named TPU slice or GPU cluster, with "
            "none here, and prints memory, FLOPs, collectives and a modelled step time."
        ),
        epilog="exit code 3: the step does not fit the machine's memory",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE.py[:ARG]|NAME")
    parser.add_argument(
        "--topology",
        required=True,
        metavar="NAME",
        help="v5p:4x4x8, v6e:16x16, 2*v5p:4x4x8 (two slices), h100:32x8 (hosts x GPUs), ...",
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        default=[],
        metavar="KEY=VALUE[,KEY=VALUE...]",
        help="one more column per word, with these settings changed: mesh.fsdp=8,mesh.model=2; the "
        "exit code is that of the first column, the config as it is",
    )
    parser.add_argument(
        "--largest-batch",
        action="store_true",
        help="search the largest batch that fits (several compiles)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the plan as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Plans; 3 when what was asked for does not fit."""
    compile_only()
    from m2jax.config import UserError
    from m2jax.config_files import load_config
    from m2jax.train.origin import settled

    if args.largest_batch and args.compare:
        raise UserError("--largest-batch with --compare: ask for one of them")
    if args.json:
        files.check_parent(args.json, "--json")
    from m2jax.plan import largest, planner, report

    experiment = settled(load_config(args.config, args.overrides))
    changes = planner.variants(args.compare)
    columns = [settled(load_config(args.config, [*args.overrides, *c])) for c in changes]

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    if args.largest_batch:
        plans = largest.largest_batch(experiment, args.topology, say=say)
        titles = [f"batch {one.batch_size:,}" for one in plans]
        fitting = [one for one in plans if one.fits]
        answer = max(fitting, key=lambda one: one.batch_size) if fitting else plans[-1]
    else:
        plans = [
            planner.plan(each, args.topology, contrastive=not columns, say=say)
            for each in (experiment, *columns)
        ]
        titles = ["as configured", *args.compare]
        answer = plans[0]
    print(report.table(plans, titles))
    if args.largest_batch:
        print(f"\n{largest.limits(plans)}")
    if args.json:
        content = planner.as_json(answer)
        if len(plans) > 1:
            content["plans"] = [planner.as_json(one) for one in plans]
        text = json.dumps(content, indent=1) + "\n"
        files.write(args.json, lambda file: file.write(text.encode()))
    return 0 if answer.fits else DOES_NOT_FIT


def compile_only() -> None:
    """Keeps jax off whatever accelerator is here: nothing of a plan runs.

    Must come before jax is imported; the second setting lets the CUDA plugin load without a GPU.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
