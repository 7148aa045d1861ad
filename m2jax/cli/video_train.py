# SPDX-License-Identifier: Apache-2.0
"""``m2jax video train``: a detector of copied segments, and the choice of keyframes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from m2jax.tasks.video.examples import Corpus


def add_parser(subparsers: Any) -> None:
    """Declares the action."""
    parser = subparsers.add_parser(
        "train",
        help="train a detector of copied segments, keyframes, or both",
        description="Trains SPD (a detector of patterns on similarity maps), SKE (which frame of "
        "each few is kept), or SSAN (both together), on one of: labelled pairs of videos with "
        "stored features; videos, of which edited copies are made; simulated sequences alone, "
        "where neither is given. The result serves align and search (--detector) and index "
        "(--keyframes).",
        allow_abbrev=False,
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument("--kind", default="spd", help="spd (default), ske or ssan")
    labelled = parser.add_argument_group("labelled pairs, in VCSL's files")
    labelled.add_argument("--features", type=Path, metavar="DIR", help="as of video align")
    labelled.add_argument("--labels", type=Path, metavar="FILE.json", help="as of video eval")
    labelled.add_argument(
        "--pairs", type=Path, metavar="CSV", help="pairs; those without labels are negatives"
    )
    edited = parser.add_argument_group("edited copies of videos")
    edited.add_argument("--model", help="as of eval: any image tower")
    edited.add_argument("--videos", nargs="+", type=Path, metavar="PATH")
    edited.add_argument("--rate", type=float, default=1.0, help="frames per second (default: 1)")
    edited.add_argument("--queries", type=int, default=60, help="edited copies (default: 60)")
    parser.add_argument("--start", type=Path, metavar="DIR", help="begin with this training")
    parser.add_argument(
        "--window", type=int, default=0, help="frames of which one is kept (spd: 1, else 4)"
    )
    parser.add_argument("--steps", type=int, default=500, help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument(
        "--simulated", type=float, default=0.5, help="share of simulated examples (default: 0.5)"
    )
    parser.add_argument(
        "--size", type=int, default=128, help="pixels of the detector's square (default: 128)"
    )
    parser.add_argument("--width", type=int, default=8, help="of the detector (default: 8)")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Trains, writes the folder."""
    import sys

    from m2jax.checkpoint.folder import check_absent
    from m2jax.config import UserError
    from m2jax.dist.host import load_devices
    from m2jax.tasks.video import saved, ssan

    check_absent(args.out)
    if not args.out.absolute().parent.is_dir():
        raise UserError(f"--out {args.out}: no such folder {args.out.absolute().parent}: make it")
    settings = ssan.Settings(
        kind=args.kind,
        window=args.window or (1 if args.kind == "spd" else 4),
        size=args.size,
        width=args.width,
        simulated=args.simulated,
        steps=args.steps,
        batch=args.batch_size,
        seed=args.seed,
    )
    _check_source(args)
    load_devices()
    start = saved.read(args.start) if args.start else None

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    corpus, model = _corpus(args, say)
    part = ssan.train(corpus, settings, start=start, model=model, say=say)
    saved.write(args.out, part)
    figures = ", ".join(f"{name} {value:.3f}" for name, value in part.report["last"].items())
    print(f"{args.out}: {args.kind} after {args.steps:,} steps: {figures}")
    return 0


def _check_source(args: argparse.Namespace) -> None:
    from m2jax.config import UserError
    from m2jax.tasks.video import decode

    labelled, edited = bool(args.features or args.labels), bool(args.model or args.videos)
    if labelled and edited:
        raise UserError("--features and --videos: choose one")
    if labelled and not (args.features and args.labels):
        raise UserError("--features and --labels: pass both")
    if args.pairs and not labelled:
        raise UserError("--pairs: belongs to --features and --labels: pass them")
    if edited and not (args.model and args.videos):
        raise UserError("--model and --videos: pass both")
    if not decode.RATES[0] <= args.rate <= decode.RATES[1]:
        raise UserError(f"--rate {args.rate}: choose {decode.RATES[0]:.3f} to {decode.RATES[1]:g}")
    if not 1 <= args.queries <= 10_000:
        raise UserError(f"--queries {args.queries}: choose 1 to 10,000")


def _corpus(args: argparse.Namespace, say: Any) -> tuple[Corpus | None, str]:
    """What to train on, and the fingerprint of its model where it is known."""
    from m2jax.tasks.video import arrays, decode, edited, features, segments
    from m2jax.tasks.video.examples import Corpus

    if args.features:
        labels = segments.read_segments(args.labels, forward=True)
        keys = segments.read_pairs(args.pairs) if args.pairs else list(labels)
        both = [arrays.videos_of(key) for key in keys]
        names = dict.fromkeys(name for pair in both for name in pair)
        known = {name: arrays.read_features(args.features, name) for name in names}
        return Corpus(known, both, [labels.get(key, []) for key in keys]), ""
    if not args.videos:
        return None, ""
    decode.check()
    encoder = features.Encoder(args.model)
    found = edited.of_videos(
        encoder,
        features.find_videos(args.videos, "--videos"),
        rate=args.rate,
        count=args.queries,
        seed=args.seed,
        say=say,
    )
    return found, encoder.identity.fingerprint
