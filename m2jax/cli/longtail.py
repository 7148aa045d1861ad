# SPDX-License-Identifier: Apache-2.0
"""``m2jax longtail``: fine-grained classes on a long tail, with metadata of place."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from m2jax.cli import files


def add_parser(subparsers: Any) -> None:
    """Declares the verb and its two actions."""
    parser = subparsers.add_parser(
        "longtail", help="fine-grained classes on a long tail, with metadata", allow_abbrev=False
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    train = actions.add_parser(
        "train",
        help="train a classifier on a table of images",
        description="Trains a classifier on the model's image features and the table's metadata. "
        "Columns: file_path, observation_id, class_id; country, code and endemic if there are any.",
        allow_abbrev=False,
    )
    _add_common(train)
    train.add_argument("--out", required=True, type=Path, metavar="DIR", help="the classifier")
    train.add_argument("--side", default="dynamic", help="dynamic (default), token, none")
    train.add_argument(
        "--loss", default="adjusted", help="adjusted (default), effective, seesaw, poly, plain"
    )
    train.add_argument("--tau", type=float, default=1.0, help="of adjusted (default: %(default)s)")
    train.add_argument("--keep", type=float, default=1.0, help="share of hardest examples (all)")
    train.add_argument("--oversample", action="store_true", help="repeat images of rare classes")
    train.add_argument(
        "--block", action="store_true", help="a residual block on the features, before the classes"
    )
    train.add_argument(
        "--contrast", type=float, default=0.0, help="weight of two views' contrast (0.001 there)"
    )
    train.add_argument(
        "--contrast-by", default="simclr", help="simclr (default), moco: with a momentum encoder"
    )
    train.add_argument(
        "--unlabelled", type=Path, metavar="FILE.csv", help="further images for --contrast"
    )
    train.add_argument("--epochs", type=int, default=60, help="(default: %(default)s)")
    train.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    train.set_defaults(run=run_train)
    predict = actions.add_parser(
        "predict", help="one class per observation, as JSON and as a page", allow_abbrev=False
    )
    _add_common(predict)
    predict.add_argument(
        "--classifier", required=True, nargs="+", type=Path, metavar="DIR", help="one or several"
    )
    predict.add_argument("--weights", default="", help="of the classifiers: 3,1 (default: equal)")
    predict.add_argument("--out", required=True, type=Path, metavar="FILE.json")
    predict.add_argument("--html", type=Path, metavar="FILE.html", help="a page with the images")
    predict.add_argument(
        "--tau", type=float, help="taken off the logits of --loss plain (0.7 there)"
    )
    predict.add_argument("--one-view", action="store_true", help="no scales, crops and mirrors")
    predict.add_argument("--no-filter", action="store_true", help="allow every class everywhere")
    predict.add_argument("--merge", default="best", help="best (default), vote, mean")
    predict.set_defaults(run=run_predict)


def _add_common(parser: Any) -> None:
    parser.add_argument("--model", required=True, help="a model or work directory, hf:OWNER/NAME")
    parser.add_argument("--table", required=True, type=Path, metavar="FILE.csv")
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="where the table's paths start (its folder)"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def run_train(args: argparse.Namespace) -> int:
    """Features, training; writes the classifier."""
    from m2jax import bundle
    from m2jax.checkpoint.folder import check_absent
    from m2jax.config import UserError
    from m2jax.dist.host import load_devices
    from m2jax.tasks.labels import features
    from m2jax.tasks.longtail import recipe, saved, table
    from m2jax.tasks.longtail.model import Settings

    check_absent(args.out)
    _check_batch(args)
    names = "side loss tau keep oversample block contrast contrast_by epochs seed".split()
    made = {name: getattr(args, name) for name in names}
    Settings(**made)
    if args.contrast_by != "simclr" and not args.contrast:
        raise UserError(f"--contrast-by {args.contrast_by}: serves --contrast alone: set that too")
    rows = table.read(args.table, args.images, labelled=True)
    table.codes(rows)
    if args.unlabelled and not args.contrast:
        raise UserError(f"--unlabelled {args.unlabelled}: serves --contrast alone: set that too")
    more = table.read(args.unlabelled, args.images, labelled=False) if args.unlabelled else []
    load_devices()
    model = bundle.load(args.model)
    settings = Settings(**made, normalize="none" if features.has_length(model) else "l2")
    found = recipe.fit(model, rows, settings, unlabelled=more, batch=args.batch_size)
    saved.write(args.out, found)
    print(
        f"{args.out}: {len(found.codes.classes):,} classes, {len(rows):,} images, trained in "
        f"{found.report['train_s']:.1f} s"
    )
    return 0


def run_predict(args: argparse.Namespace) -> int:
    """Scores, filters, merges, and writes what was found."""
    from m2jax import bundle
    from m2jax.config import UserError
    from m2jax.dist.host import load_devices
    from m2jax.eval.sets.records import Files
    from m2jax.tasks.longtail import page, recipe, saved, table
    from m2jax.tasks.longtail.views import FULL, Views

    files.check_outputs(args.out, args.html)
    _check_batch(args)
    if args.merge not in ("best", "vote", "mean"):
        raise UserError(f"--merge {args.merge}: use one of best, vote, mean")
    weights = _weights(args.weights)
    classifiers = [saved.read(path) for path in args.classifier]
    rows = table.read(args.table, args.images, labelled=False)
    plain = all(not each.settings.trained_adjustment for each in classifiers)
    tau = args.tau if args.tau is not None else recipe.TAU if plain else 0.0
    kinds = Views() if args.one_view else FULL
    steps = recipe.Steps(kinds, tau, not args.no_filter, args.merge)
    told = all(row.label for row in rows)
    if told:
        recipe.truth_of(classifiers[0], rows)  # refused before the long work
    load_devices()
    model = bundle.load(args.model)
    found = recipe.predict(
        model, classifiers, rows, steps, weights=weights, batch=args.batch_size, show=True
    )
    content = recipe.as_json(classifiers[0], found, rows)
    if told:
        content["figures"] = recipe.figures(classifiers[0], found, rows)
    text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
    files.write(args.out, lambda file: file.write(text.encode()))
    if args.html is not None:
        html = page.of(content, Files([row.file for row in rows]), rows)
        files.write(args.html, lambda file: file.write(html.encode()))
    figures = ", ".join(f"{k} {v:.3f}" for k, v in content.get("figures", {}).items())
    print(f"{args.out}: {len(content['observations'])} observations{': ' * bool(figures)}{figures}")
    return 0


def _check_batch(args: argparse.Namespace) -> None:
    from m2jax.config import UserError

    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: must be at least 1")


def _weights(text: str) -> list[float]:
    from m2jax.config import UserError

    try:
        return [float(each) for each in text.split(",") if each]
    except ValueError:
        raise UserError(f"--weights {text}: write numbers with commas between") from None
