# SPDX-License-Identifier: Apache-2.0
"""``m2jax video search``: which parts of a video come from a library's videos."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from m2jax.cli import files


def add_parser(subparsers: Any) -> None:
    """Declares the action."""
    parser = subparsers.add_parser(
        "search",
        help="find which parts of a video come from a library's videos",
        description="Looks up the nearest stored frames of each of the query's frames, makes a "
        "sparse similarity map of each video that was hit, and finds segments on these maps. Times "
        "are seconds; segments end where the copy is over.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, help="the model that the library was made with")
    parser.add_argument("--index", required=True, type=Path, metavar="DIR")
    parser.add_argument("--query", required=True, type=Path, metavar="VIDEO")
    parser.add_argument("--method", default="TN", help="HV, TN (default), DP, DTW or SPD")
    parser.add_argument("--detector", type=Path, metavar="DIR", help="for SPD: made by video train")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--candidates", type=int, default=20, help="videos looked at (default: 20)")
    parser.add_argument(
        "--nearest", type=int, default=20, help="stored frames per frame (default: 20)"
    )
    parser.add_argument(
        "--full-maps", action="store_true", help="similarities of all frames of a candidate"
    )
    parser.add_argument(
        "--raw", action="store_true", help="cosines as they are, the library's background not at 0"
    )
    parser.add_argument(
        "--background",
        type=float,
        metavar="COSINE",
        help="that unrelated frames seldom exceed, as library.json of a library of several videos "
        "has it for its model (default: the library's own; one video alone has none)",
    )
    parser.add_argument("--leave-out", default="", metavar="NAME", help="a video not looked at")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the matches here")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page of them here")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Searches, prints, writes."""
    import sys

    from m2jax.config import UserError
    from m2jax.dist.host import load_devices
    from m2jax.tasks.video import decode, features, library, page, pattern, saved, search

    _check(args)
    decode.check()
    stored = library.load(args.index)  # before the model: a wrong folder is said at once
    names = [video.name for video in stored.videos]
    if args.leave_out and args.leave_out not in names:
        raise UserError(
            f"--leave-out {args.leave_out:.80}: no video of {args.index}: names are paths below "
            f"what was indexed, as {names[0] if names else 'folder/clip.mp4':.80}"
        )
    load_devices()
    trained = saved.read(args.detector) if args.detector else None
    method = pattern.chosen(args.method, args.set, trained)
    choose = library.load_keyframes(args.index, stored)
    pattern.check_windows(trained, choose, f"--detector {args.detector}", "the library holds")
    if not args.query.is_file():
        raise UserError(f"--query {args.query}: no such file: check the path")
    encoder = features.Encoder(args.model)
    found = library.load(args.index, encoder.identity)
    if args.background is not None:
        found.background = args.background
    elif len(found.videos) == 1 and not args.raw:
        print(f"warning: --index {args.index}: {library.ALONE}", file=sys.stderr)
    frames = encoder.video(args.query, found.rate)
    index = library.open_index(args.index, found)
    try:
        matches = search.search(
            found,
            index,
            frames,
            folder=args.index,
            method=method,
            candidates=args.candidates,
            nearest=args.nearest,
            full_maps=args.full_maps,
            rescale=not args.raw,
            leave_out=args.leave_out,
            choose=choose,
        )
    finally:
        index.close()
    document = search.document(str(args.query), len(frames), found, args.method, matches)
    if args.json:
        text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
        files.write(args.json, lambda file: file.write(text.encode()))
    if args.html:
        known = {v.name: (Path(v.path), (v.length or v.frames) / found.rate) for v in found.videos}
        written = page.render(document, args.query, known)
        files.write(args.html, lambda file: file.write(written.encode()))
    for match in matches:
        print(
            f"{match.query_start:8.1f} to {match.query_end:.1f} s from {match.video} "
            f"{match.reference_start:.1f} to {match.reference_end:.1f} s ({match.score:.2f})"
        )
    print(f"{args.query}: {len(matches)} copied segments")
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuses words before any work is done."""
    from m2jax.config import UserError

    for flag, value in (("--candidates", args.candidates), ("--nearest", args.nearest)):
        if not 1 <= value <= 1000:
            raise UserError(f"{flag} {value}: choose 1 to 1,000")
    for flag, path in (("--json", args.json), ("--html", args.html)):
        if path:
            files.check_parent(path, flag)
    if args.background is not None and (args.raw or not 0 <= args.background < 1):
        raise UserError(
            f"--background {args.background}: choose 0 to below 1, and not beside --raw"
        )
