# SPDX-License-Identifier: Apache-2.0
"""``m2jax embed``: features of images or of texts in one NumPy file, or of whole shards."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from m2jax.cli import files

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def add_parser(subparsers: Any) -> None:
    """Declares the verb."""
    parser = subparsers.add_parser(
        "embed",
        help="write features of images, texts or whole shards",
        description="Writes an .npz with features [n, dim] (float32, unit rows) and ids [n]: the "
        "paths of the images, or the line numbers of the texts from 1. With --shards, a folder "
        "with a file of features per shard; started again, it goes on where it was.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model", required=True, help="a model or work directory, hf:OWNER/NAME, s3://..."
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--images", nargs="+", type=Path, metavar="PATH", help="image files, or folders of them"
    )
    source.add_argument("--texts", type=Path, metavar="FILE", help="one text per line, UTF-8")
    source.add_argument(
        "--shards", nargs="+", metavar="GLOB", help="ArrayRecord shards of a build, or tars"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.npz|DIR")
    parser.add_argument("--batch-size", type=int, default=64, help="items at once (default: 64)")
    parser.add_argument(
        "--model-devices",
        "--split",
        type=int,
        default=1,
        metavar="N",
        help="spread the parameters over N devices (1); batches lie over all",
    )
    shards = parser.add_argument_group("with --shards")
    shards.add_argument("--format", default="parquet", help="parquet (default) or array_record")
    shards.add_argument("--no-texts", action="store_true", help="features of the images alone")
    shards.add_argument(
        "--part", default="1/1", metavar="I/N", help="the I-th of N equal shares of the shards"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Reads the input, encodes it in batches, writes the file."""
    import numpy as np

    from m2jax import bundle
    from m2jax.config import UserError
    from m2jax.dist.host import load_devices
    from m2jax.dist.mesh import local_mesh
    from m2jax.tasks import embedder

    for flag, value in (("--batch-size", args.batch_size), ("--model-devices", args.model_devices)):
        if value < 1:
            raise UserError(f"{flag} {value}: must be at least 1")
    if args.shards:
        return run_shards(args)
    if args.out.suffix != ".npz":
        raise UserError(f"--out {args.out}: not an .npz file: end the name in .npz")
    files.check_parent(args.out, "--out")
    items = image_files(args.images) if args.images else text_lines(args.texts)
    load_devices()
    if embedder.is_folder(Path(args.model)):
        if args.texts:
            raise UserError(f"--model {args.model}: embeds images alone: give --images")
        model = embedder.read(Path(args.model))
    else:
        model = bundle.load(args.model, mesh=local_mesh(args.model_devices))
    encode = _encode_images if args.images else _encode_texts
    size = min(args.batch_size, len(items))
    features = []
    for first in range(0, len(items), size):
        batch = list(items[first : first + size])
        full = batch + batch[-1:] * (size - len(batch))  # one shape: compiled once
        features.append(np.asarray(encode(model, full), np.float32)[: len(batch)])
        print(f"\r{first + len(batch)}/{len(items)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    ids = [str(path) for path in items] if args.images else range(1, len(items) + 1)
    arrays = {"features": np.concatenate(features), "ids": np.array(ids)}
    files.write(args.out, lambda file: np.savez(file, **arrays))
    return 0


def run_shards(args: argparse.Namespace) -> int:
    """Embeds shards into a folder."""
    from m2jax import bulk
    from m2jax.config import UserError
    from m2jax.data import stores
    from m2jax.dist.host import load_devices

    index, slash, count = args.part.partition("/")
    fits = slash and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)
    if not fits:
        raise UserError(f"--part {args.part}: write I/N with I from 1 to N")
    found = set(stores.matching(args.shards, "--shards"))
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out}: is a file: name a folder")
    load_devices()
    done = bulk.embed_shards(
        args.model,
        sorted(found),
        args.out,
        bulk.Options(
            format=args.format,
            batch=args.batch_size,
            texts=not args.no_texts,
            split=args.model_devices,
            part=(int(index) - 1, int(count)),
        ),
        say=lambda line: print(line, file=sys.stderr),
    )
    print(
        f"{args.out}: {done.records:,} records of {done.shards} shards, {done.skipped} unreadable"
    )
    return 0


def image_files(paths: Sequence[Path]) -> list[Path]:
    """The files, and for each folder the images under it in order of name.

    Raises:
        UserError: a path does not exist, or a folder holds no image.
    """
    from m2jax.config import UserError

    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"--images {path}: no such file: check the path")
        inside = [path]
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
        if not inside:
            raise UserError(f"--images {path}: holds no image: name a folder with images")
        found += inside
    return found


def text_lines(path: Path) -> list[str]:
    """The lines of a text file.

    Raises:
        UserError: it does not exist, is no UTF-8, holds nothing, or has an empty line.
    """
    from m2jax.config import UserError

    try:
        # Not splitlines: captions hold line separators that end no line of a file.
        lines = path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except OSError as error:
        raise UserError(f"--texts {path}: {error.strerror}: check the path") from None
    except UnicodeDecodeError:
        raise UserError(f"--texts {path}: not UTF-8: save it in that encoding") from None
    if lines == [""]:
        raise UserError(f"--texts {path}: holds no text: write one per line")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise UserError(f"--texts {path}: line {number} is empty: remove it")
    return lines


def _encode_images(model: Any, paths: Sequence[Path]) -> Any:
    from m2jax.data.image import open_image

    return model.encode_image(model.preprocess([open_image(path) for path in paths]))


def _encode_texts(model: Any, texts: Sequence[str]) -> Any:
    tokens = model.tokenize(texts)
    return model.encode_text(tokens.ids, tokens.mask)
