# SPDX-License-Identifier: Apache-2.0
"""``m2jax explore``: a local page that shows what a model finds in a folder."""

from __future__ import annotations

import argparse
import threading
import webbrowser
from pathlib import Path
from typing import Any

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def add_parser(subparsers: Any) -> None:
    """Declares the verb."""
    parser = subparsers.add_parser(
        "explore",
        help="a local page: type words or drop a picture, see what a model finds",
        description="Serves a page on this machine. Type words in either language or drop a "
        "picture: ranked pictures of the folder with their cosines, and labels that you type in. "
        "Two models stand side by side. Ends with Ctrl-C.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model", required=True, action="append", help="as of eval; give it twice to compare"
    )
    parser.add_argument("--images", required=True, type=Path, metavar="FOLDER")
    parser.add_argument(
        "--host", default="127.0.0.1", help="where to listen (default: this machine alone)"
    )
    parser.add_argument("--port", type=int, default=0, help="(default: the first free from 7860)")
    parser.add_argument("--open", action="store_true", help="open it in the browser")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Encodes the folder, serves until interrupted."""
    from m2jax import bundle
    from m2jax.config import UserError
    from m2jax.dist.host import load_devices
    from m2jax.eval import explore, explore_page

    if len(args.model) > 2:
        raise UserError(f"--model: given {len(args.model)} times: two stand side by side at most")
    if not 0 <= args.port < 2**16:
        raise UserError(f"--port {args.port}: no port: use 1024 to 65535")
    explore_page.check(args.host, args.port)
    load_devices()
    gallery = explore.gather(args.images, [(path, bundle.load(path)) for path in args.model])
    with explore_page.served(gallery, host=args.host, port=args.port) as address:
        print(f"{address} (Ctrl-C ends it)", flush=True)
        if args.host not in LOOPBACK:
            print("warning: others on the network can look, and nobody is asked who they are")
        if args.open:
            webbrowser.open(address)
        wait(threading.Event())
    return 0


def wait(end: threading.Event) -> None:
    """Until interrupted, which is how the page is meant to be left."""
    try:
        end.wait()
    except KeyboardInterrupt:
        print()
