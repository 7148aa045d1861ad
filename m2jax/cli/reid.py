# SPDX-License-Identifier: Apache-2.0
"""``m2jax reid``: train and measure re-identification on sets in their published layouts."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from m2jax.cli import files


def add_parser(subparsers: Any) -> None:
    """Declares the verb."""
    parser = subparsers.add_parser("reid", help="re-identification: train, mAP and CMC")
    parts = parser.add_subparsers(dest="part", required=True, metavar="PART")
    _add_train(parts)
    measure = parts.add_parser(
        "eval",
        help="mAP and CMC on Market-1501, CUHK03, MSMT17 or the emoji set",
        description="Embeds query and gallery with a model and scores them: of each query's own "
        "identity the images by its own camera are left out.",
        allow_abbrev=False,
    )
    measure.add_argument("--model", required=True, help="of reid train, or what m2jax embed takes")
    _add_data(measure)
    measure.add_argument("--batch-size", type=int, default=64, help="images at once")
    measure.add_argument(
        "--rerank", action="store_true", help="k-reciprocal re-ranking (20, 6, 0.3) too"
    )
    measure.add_argument(
        "--no-cameras",
        action="store_true",
        help="do not tell them to a model that was trained with --cameras",
    )
    measure.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    measure.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run)


def _add_data(parser: Any) -> None:
    parser.add_argument("--data", type=Path, metavar="DIR", help="the unpacked set")
    parser.add_argument(
        "--layout", required=True, help="market1501, cuhk03, msmt17, emoji, emoji-new-styles"
    )


def _add_train(parts: Any) -> None:
    train = parts.add_parser(
        "train",
        help="train a tower with class tokens (DC-Former)",
        description="Trains DC-Former into a folder, on random or on hard batches; a run that was "
        "cut off goes on. The model is in DIR/model; m2jax reid eval and m2jax embed take DIR.",
        allow_abbrev=False,
    )
    _add_data(train)
    train.add_argument("--out", required=True, type=Path, metavar="DIR", help="of the run")
    train.add_argument(
        "--init", metavar="MODEL", help="start from its image tower: an M2-Encoder, a CLIP or ViT"
    )
    train.add_argument("--tokens", type=int, default=2, help="class tokens, K (default: 2)")
    train.add_argument("--size", default="", metavar="HxW", help="pixels (256x128; 32x32 emoji)")
    train.add_argument(
        "--stride", type=int, default=0, help="between patches (default: no overlap)"
    )
    sizes = train.add_argument_group("a tower without --init")
    for name, value in (("width", 96), ("layers", 3), ("heads", 3), ("patch", 4)):
        sizes.add_argument(f"--{name}", type=int, default=value, help="(default: %(default)s)")
    recipe = train.add_argument_group("recipe")
    recipe.add_argument(
        "--batches", default="pk", help="pk (default), window (hard, as published), nearest (hard)"
    )
    recipe.add_argument(
        "--prototypes",
        default="classifier",
        help="what tells hard batches who is alike: classifier (its weights; default), or features "
        "(means of each identity's, moved by every batch)",
    )
    recipe.add_argument("--p", type=int, default=16, help="identities of a batch (default: 16)")
    recipe.add_argument("--k", type=int, default=4, help="images of each (default: 4)")
    recipe.add_argument("--epochs", type=int, default=120, help="(default: 120)")
    recipe.add_argument("--optimizer", default="", help="sgd (with --init), adamw (without)")
    recipe.add_argument("--learning-rate", type=float, default=0.0, help="0.008 sgd, 0.001 adamw")
    recipe.add_argument("--diversity", type=float, default=1.0, help="weight (default: 1)")
    recipe.add_argument("--dynamic", action="store_true", help="DWC instead of SDC")
    recipe.add_argument(
        "--scenes", default="none", help="take cameras out: reversal, confusion (default: none)"
    )
    recipe.add_argument("--scene-weight", type=float, default=0.1, help="(default: 0.1)")
    recipe.add_argument("--cameras", action="store_true", help="side information of the camera")
    recipe.add_argument("--seed", type=int, default=0, help="(default: 0)")
    train.add_argument("--debug", action="store_true", help="show the traceback of an error")


def run(args: argparse.Namespace) -> int:
    """Runs one part."""
    return {"train": run_train, "eval": run_eval}[args.part](args)


def run_train(args: argparse.Namespace) -> int:
    """Reads, trains, leaves the model."""
    from m2jax.checkpoint.folder import check_absent
    from m2jax.config import UserError
    from m2jax.dist.host import load_devices
    from m2jax.tasks import embedder
    from m2jax.tasks.epochs import PreemptedError, check_alone
    from m2jax.tasks.reid import readers, train
    from m2jax.tasks.reid.dcformer import Settings
    from m2jax.train.main import PREEMPTED

    check_alone()
    if not args.out.is_dir():
        check_absent(args.out)
    height, width = pair_of(args.size or ("32x32" if args.layout in readers.EMOJI else "256x128"))
    optimizer = args.optimizer or ("sgd" if args.init else "adamw")
    rate = args.learning_rate or (0.008 if optimizer == "sgd" else 1e-3)
    names = ("batches", "p", "k", "epochs", "seed")
    recipe = train.Recipe(
        optimizer=optimizer, learning_rate=rate, **{name: getattr(args, name) for name in names}
    )
    data = readers.read(args.layout, args.data)
    changes = {
        "tokens": args.tokens,
        "height": height,
        "image_width": width,
        "cameras": data.cameras if args.cameras else 0,
    }
    if args.stride:
        changes["stride"] = (args.stride, args.stride)
    load_devices()
    if args.init:
        start = embedder.start_from(args.init, **changes)
    else:
        sizes = {"width": args.width, "layers": args.layers, "heads": args.heads}
        start = embedder.start_small(**sizes, patch_size=args.patch, **changes)
    names = ("diversity", "dynamic", "scenes", "scene_weight", "prototypes")
    settings = Settings(
        tower=start.tower,
        identities=0,
        pad=max(1, round(10 * height / 256)),  # ten pixels of the published height
        mean=start.pixels.mean,
        std=start.pixels.std,
        **{name: getattr(args, name) for name in names},
    )
    if not (0 <= args.diversity < math.inf and 0 <= args.scene_weight < math.inf):
        raise UserError("--diversity, --scene-weight: must be 0 or more")
    try:
        made = train.train(data, settings, recipe, args.out, start=start.params)
    except PreemptedError as told:
        print(told)
        return PREEMPTED
    print(
        f"{args.out}: {int(data.train.labels.identities.max()) + 1:,} identities, "
        f"{len(data.train.images):,} images, {made.report['steps']:,} steps in "
        f"{made.report['seconds']:.0f} s"
    )
    return 0


def pair_of(text: str) -> tuple[int, int]:
    """Height and width of HxW.

    Raises:
        UserError: other words.
    """
    from m2jax.config import UserError

    height, cross, width = text.partition("x")
    if not (cross and height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise UserError(f"--size {text}: write HxW in pixels, such as 256x128")
    return int(height), int(width)


def run_eval(args: argparse.Namespace) -> int:
    """Reads, embeds, scores and prints."""
    from m2jax import bundle
    from m2jax.config import UserError
    from m2jax.dist.host import load_devices
    from m2jax.tasks import embedder
    from m2jax.tasks.reid import evaluate, readers

    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: must be at least 1")
    if args.json:
        files.check_parent(args.json, "--json")
    data = readers.read(args.layout, args.data)
    load_devices()
    made = embedder.is_folder(Path(args.model))
    model = embedder.read(Path(args.model)) if made else bundle.load(args.model)

    def say(done: int, total: int) -> None:
        print(f"\r{done:,}/{total:,}", end="", file=sys.stderr, flush=True)

    words = {"batch": args.batch_size, "rerank": args.rerank, "cameras": not args.no_cameras}
    found = evaluate.evaluate(model, data, **words, say=say)
    print(file=sys.stderr)
    for name, each in found.items():
        ranks = ", ".join(f"R{r} {each[f'r{r}']:.4f}" for r in evaluate.RANKS if f"r{r}" in each)
        print(f"{name}: mAP {each['map']:.4f}, {ranks} over {each['queries']:,} queries")
    if args.json:
        text = json.dumps(found, indent=1) + "\n"
        files.write(args.json, lambda file: file.write(text.encode()))
    return 0
