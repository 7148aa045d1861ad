# SPDX-License-Identifier: Apache-2.0
"""``m2jax retrieval train-compatible``: a new model whose vectors an old one's can be found by."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any


def add_parser(parts: Any) -> None:
    """Declares the part."""
    train = parts.add_parser(
        "train-compatible",
        help="train a model that searches an older one's vectors (AdvBCT)",
        description="Trains into a folder; a run that was cut off goes on. m2jax embed takes DIR "
        "as its model. With --method none it is trained without regard to an old model, as the "
        "first one is.",
        allow_abbrev=False,
    )
    train.add_argument("--data", type=Path, metavar="DIR", help="labelled training images")
    train.add_argument(
        "--layout", required=True, help="gldv2, market1501, cuhk03, msmt17, emoji: a class each"
    )
    train.add_argument("--classes", type=float, default=1.0, help="a share of them alone (all)")
    train.add_argument("--out", required=True, type=Path, metavar="DIR", help="of the run")
    old = train.add_mutually_exclusive_group()
    old.add_argument("--old", type=Path, metavar="DIR", help="an older model, made by this command")
    old.add_argument(
        "--old-features", nargs="+", type=Path, metavar="FILE.npz",
        help="or any model's vectors of these images, made by m2jax embed",
    )  # fmt: skip
    train.add_argument(
        "--old-classes", type=Path, metavar="FILE",
        help="with them: classes it was trained on, one a line (default: all with vectors)",
    )  # fmt: skip
    train.add_argument(
        "--method", default="advbct", help="advbct (default), bct, unibct, hot-refresh, lce, none"
    )
    train.add_argument("--tau", type=float, default=1.0, help="of advbct's boundaries (default: 1)")
    train.add_argument("--init", metavar="MODEL", help="start from its image tower")
    train.add_argument("--size", default="", metavar="HxW", help="pixels (224x224; 32x32 emoji)")
    sizes = train.add_argument_group("a tower without --init")
    for name, value in (("width", 96), ("layers", 3), ("heads", 3), ("patch", 4)):
        sizes.add_argument(f"--{name}", type=int, default=value, help="(default: %(default)s)")
    recipe = train.add_argument_group("recipe")
    recipe.add_argument("--dim", type=int, default=256, help="of vectors (default: the old one's)")
    recipe.add_argument("--epochs", type=int, default=30, help="(default: 30)")
    recipe.add_argument("--batch-size", type=int, default=256, help="(default: 256)")
    recipe.add_argument("--optimizer", default="", help="sgd (with --init), adamw (without)")
    recipe.add_argument("--learning-rate", type=float, default=0.0, help="0.1 sgd, 0.001 adamw")
    recipe.add_argument("--flip", type=float, default=0.0, help="share of mirrored images (none)")
    recipe.add_argument("--pad", type=int, default=0, help="pixels of random shifts (none)")
    recipe.add_argument("--seed", type=int, default=0, help="(default: 0)")
    train.add_argument("--debug", action="store_true", help="show the traceback of an error")


def run(args: argparse.Namespace) -> int:
    """Reads, embeds by the old model where it must, trains."""
    from m2jax.checkpoint.folder import check_absent
    from m2jax.cli.reid import pair_of
    from m2jax.config import UserError
    from m2jax.dist.host import load_devices
    from m2jax.tasks import embedder
    from m2jax.tasks.epochs import PreemptedError, check_alone
    from m2jax.tasks.reid import readers
    from m2jax.tasks.retrieval import train_compatible, training_sets
    from m2jax.tasks.retrieval.compatible import METHODS, Settings
    from m2jax.train.main import PREEMPTED

    check_alone()
    if not args.out.is_dir():
        check_absent(args.out)
    if args.method not in METHODS:
        raise UserError(f"--method {args.method}: use one of {', '.join(METHODS)}")
    if (args.method == "none") != (args.old is None and args.old_features is None):
        raise UserError(
            f"--method {args.method}: an old model goes with every method but none: "
            "give --old or --old-features, or take it away"
        )
    if args.old_classes and not args.old_features:
        raise UserError("--old-classes: goes with --old-features: give those, or take it away")
    if not 0 <= args.tau < math.inf:
        raise UserError(f"--tau {args.tau}: must be 0 or more")
    if min(args.dim, args.epochs) < 1 or not 0 <= args.flip <= 1 or args.pad < 0:
        raise UserError("--dim, --epochs: at least 1; --flip: 0 to 1; --pad: 0 or more")
    optimizer = args.optimizer or ("sgd" if args.init else "adamw")
    recipe = train_compatible.Recipe(
        batch=args.batch_size,
        optimizer=optimizer,
        learning_rate=args.learning_rate or (0.1 if optimizer == "sgd" else 1e-3),
        seed=args.seed,
    )
    height, width = pair_of(args.size or ("32x32" if args.layout in readers.EMOJI else "224x224"))
    data = training_sets.some_classes(training_sets.read(args.layout, args.data), args.classes)
    load_devices()
    stored = None
    if args.old_features:
        known = args.old_classes and _lines(args.old_classes)
        data, stored = training_sets.stored_in(args.old_features, data, known)
    elif args.old:
        old = embedder.read(args.old)
        data, stored = training_sets.stored_by(old, data, say=lambda n: _say(n, len(data.labels)))
        print(file=sys.stderr)
    sizes = {"tokens": 1, "height": height, "image_width": width}
    if args.init:
        start = embedder.start_from(args.init, **sizes)
    else:
        sizes |= {"width": args.width, "layers": args.layers, "heads": args.heads}
        start = embedder.start_small(**sizes, patch_size=args.patch)
    settings = Settings(
        tower=start.tower,
        pixels=start.pixels,
        **{name: getattr(args, name) for name in ("method", "dim", "tau", "epochs", "flip", "pad")},
    )
    try:
        made = train_compatible.train(
            data, settings, recipe, args.out, stored=stored, start=start.params
        )
    except PreemptedError as told:
        print(told)
        return PREEMPTED
    known = 0 if stored is None else stored.known
    print(
        f"{args.out}: {len(data.names):,} classes ({known:,} of the old model's), "
        f"{len(data.labels):,} images, {made.report['steps']:,} steps in "
        f"{made.report['seconds']:.0f} s"
    )
    return 0


def _say(done: int, total: int) -> None:
    print(f"\rold vectors {done:,}/{total:,}", end="", file=sys.stderr, flush=True)


def _lines(file: Path) -> list[str]:
    from m2jax.config import UserError

    try:
        found = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--old-classes {file}: unreadable ({error}): mend it") from error
    return [line.strip() for line in found if line.strip()]
