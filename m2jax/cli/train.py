# SPDX-License-Identifier: Apache-2.0
"""``m2jax train``: one run from its config; started again, it goes on where it stopped."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Declares the verb."""
    parser = subparsers.add_parser(
        "train",
        help="train a model",
        description="Trains into a work directory. A run that was cut off resumes.",
        epilog="--config.KEY.SUB=VALUE changes one setting, for example --config.train.steps=100",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE.py[:ARG]|NAME",
        help="the experiment: a file, or the name of one that ships with m2jax",
    )
    parser.add_argument(
        "--workdir",
        required=True,
        help="where checkpoints, metrics and the report go: a folder, s3://... or gs://...",
    )
    parser.add_argument(
        "--init",
        metavar="MODEL_DIR",
        help="start from this trained model: a work directory, checkpoint, model folder or "
        "hf:OWNER/NAME; the same as --config.finetune.init=MODEL_DIR",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Trains; the exit code is the run's."""
    import jax

    from m2jax.cli.main import report
    from m2jax.config_files import load_config
    from m2jax.dist.bootstrap import leave_peers, start
    from m2jax.train import main

    init = [f"finetune.init={args.init}"] if args.init else []
    experiment = load_config(args.config, [*args.overrides, *init])
    main.use_cpu_devices(experiment)
    start()
    try:
        return main.run(experiment, args.workdir)
    except Exception as error:
        if jax.process_count() > 1:
            code = 1
            try:
                code = report(error, debug=args.debug)
            finally:  # the log may lie on the disk that is full: it must end all the same
                leave_peers(code)
        raise
