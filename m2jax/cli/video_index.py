# SPDX-License-Identifier: Apache-2.0
"""``m2jax video index``: makes a library of videos that can be searched."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Declares the action."""
    parser = subparsers.add_parser(
        "index",
        help="make a library of videos that can be searched",
        description="Writes features of the videos' frames into a folder and puts them into a "
        "Milvus index: a file in the folder, or a cluster. Started again, it goes on where it was; "
        "more videos join. A video that cannot be read is left out by name (skipped.jsonl).",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, help="as of eval: any image tower")
    parser.add_argument("--videos", required=True, nargs="+", type=Path, metavar="PATH")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument("--rate", type=float, default=1.0, help="frames per second (default: 1)")
    parser.add_argument(
        "--ann",
        default="hnsw",
        help="hnsw (default) or exact, by Milvus; scan: exact without a database, all features in "
        "memory, for up to some millions of frames",
    )
    parser.add_argument(
        "--milvus",
        default="",
        metavar="URI",
        help="a cluster, http://HOST:19530 (token: $MILVUS_TOKEN)",
    )
    parser.add_argument(
        "--keyframes",
        type=Path,
        metavar="DIR",
        help="store keyframes only, chosen by this training (video train --kind ske or ssan)",
    )
    parser.add_argument(
        "--most-alike",
        type=float,
        default=1.0,
        metavar="COSINE",
        help="of keyframes, drop those more like the one before (default: 1, none)",
    )
    parser.add_argument("--batch-size", type=int, default=64, help="frames at once (default: 64)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Indexes, and says how much."""
    import sys

    from m2jax.config import UserError
    from m2jax.dist.host import load_devices
    from m2jax.tasks.video import decode, features, library, pattern, saved

    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: must be at least 1")
    if not decode.RATES[0] <= args.rate <= decode.RATES[1]:
        raise UserError(f"--rate {args.rate}: choose {decode.RATES[0]:.3f} to {decode.RATES[1]:g}")
    if not 0 < args.most_alike <= 1:
        raise UserError(f"--most-alike {args.most_alike}: choose above 0 and up to 1")
    choose = None
    decode.check()
    videos = features.find_videos(args.videos, "--videos")
    load_devices()
    if args.keyframes:
        part = saved.read(args.keyframes)
        if part.settings.window == 1:
            raise UserError(
                f"--keyframes {args.keyframes}: was trained on all frames: name a training of ske "
                "or ssan, or of spd with --window"
            )
        choose = pattern.Keyframes(part, args.most_alike)
    elif args.most_alike < 1:
        raise UserError("--most-alike: thins keyframes: pass --keyframes")
    done = library.build(
        features.Encoder(args.model, args.batch_size),
        videos,
        args.out,
        rate=args.rate,
        kind=args.ann,
        uri=args.milvus,
        choose=choose,
        say=lambda line: print(line, file=sys.stderr),
    )
    print(
        f"{args.out}: {done.videos:,} videos and {done.frames:,} frames more, "
        f"{done.skipped} unreadable"
    )
    return 0
