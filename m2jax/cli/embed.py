# SPDX-License-Identifier: Apache-2.0
"""``m2jax embed``: features of images or of texts, in one NumPy file."""

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
        help="write features of images or texts",
        description="Writes an .npz with features [n, dim] (float32, unit rows) and ids [n]: the "
        "paths of the images, or the line numbers of the texts from 1.",
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
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.npz")
    parser.add_argument("--batch-size", type=int, default=64, help="items at once (default: 64)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Reads the input, encodes it in batches, writes the file."""
    import numpy as np

    from m2jax import bundle
    from m2jax.config import UserError
    from m2jax.dist.host import load_devices

    if args.out.suffix != ".npz":
        raise UserError(f"--out {args.out}: not an .npz file: end the name in .npz")
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: must be at least 1")
    files.check_parent(args.out, "--out")
    items = image_files(args.images) if args.images else text_lines(args.texts)
    load_devices()
    model = bundle.load(args.model)
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
