# SPDX-License-Identifier: Apache-2.0
"""``m2jax eval``: scores a model on a suite."""

from __future__ import annotations

import argparse
import functools
import json
import math
import re
from pathlib import Path
from typing import Any

from m2jax.cli import files

EPILOG = """\
suites without a data set of their own (built at first use): emoji, emoji-validation, emoji-scenes,
  emoji-scenes-120 (of the concepts of a training with data.concepts=120)

suites over --data [READER:]PATH:
  zero-shot, linear-probe, fine-tune   pictures with labels (zero-shot: one or several each)
  retrieval                            pictures with captions
  choice                               pictures with questions and candidate answers
  imagenet, cub, dogs, cars, coco-objects, coco-count, vg-position, vg-interaction, vqa
                                       the same, on the layout of that release

readers (guessed from the path where not named):
  jsonl    one object per line: image, and caption | label | texts with right (and question)
  shards   webdataset tars ('a/*.tar'), or a folder as CLIP_benchmark writes it
  tfds     tfds:NAME as TFDS calls it, or the folder of one version (ArrayRecord files)
  folder   one folder of images per class, or such folders in one per split
  cub, dogs, cars, coco-count, coco-objects, vg-position, vg-interaction, vqa
  --data, --train-data and --images may be s3://... or gs://...; of a .jsonl there --images is the
  folder its paths start from
vg-position and vg-interaction are made from Visual Genome's relationships alone, no other set of
  interactions is read; the questions of the published VG-POS and HOI-POS were not released: compare
  models with each other by them, not with published figures
{split} in a path stands for --split, and for --train-split where a probe is trained
"""


def add_parser(subparsers: Any) -> None:
    """Declares the verb."""
    parser = subparsers.add_parser(
        "eval",
        help="score a model: zero-shot classification, retrieval, probes, captions",
        description="Scores a model. Shares are between 0 and 1, CIDEr between 0 and 10.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model", required=True, help="a model or work directory, hf:OWNER/NAME, s3://..."
    )
    parser.add_argument("--suite", default="emoji", help="see below (default: emoji)")
    parser.add_argument(
        "--data", default="", metavar="[READER:]PATH", help="the data set; the emoji's: the cache"
    )
    parser.add_argument("--name", default="", help="of the data set in the names of figures")
    parser.add_argument("--split", default="", help="of the data set (default: the suite's)")
    parser.add_argument("--train-split", default="train", help="of probes (default: train)")
    parser.add_argument(
        "--train-data", default="", metavar="[READER:]PATH", help="of probes (default: --data)"
    )
    parser.add_argument("--epochs", type=int, help="of fine-tuning (10)")
    parser.add_argument("--learning-rate", type=float, help="of fine-tuning, at its most (1e-4)")
    parser.add_argument("--languages", default="en,zh", help="comma-separated (default: en,zh)")
    parser.add_argument("--images", default="", metavar="DIR", help="where paths of images start")
    parser.add_argument(
        "--classes", type=Path, metavar="FILE", help="names of classes: lines, or JSON by language"
    )
    parser.add_argument(
        "--templates", type=Path, metavar="FILE", help="prompts with {c}: lines, or JSON"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="pictures at once (64)")
    parser.add_argument(
        "--model-devices",
        type=int,
        default=1,
        metavar="N",
        help="spread the parameters over N devices (1)",
    )
    parser.add_argument(
        "--hold-out-styles",
        default="",
        metavar="STYLE,...",
        help="emoji-validation: styles kept out of training (default: those of the model's run)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the figures here, examples beside them"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables here")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Scores, prints the table, writes the figures."""
    from m2jax import bundle
    from m2jax.config import UserError
    from m2jax.dist.host import load_devices
    from m2jax.dist.mesh import local_mesh
    from m2jax.eval import runner, tables

    languages = tuple(part for part in args.languages.split(",") if part)
    if not languages:
        raise UserError("--languages: names no language: write en,zh")
    for flag, value in (("--batch-size", args.batch_size), ("--model-devices", args.model_devices)):
        if value < 1:
            raise UserError(f"{flag} {value}: must be at least 1")
    for path, flag in ((args.json, "--json"), (args.markdown, "--markdown")):
        if path:
            files.check_parent(path, flag)
    request = _request(args, languages)
    runner.check(args.suite, languages, request)
    load_devices()
    held_out = tuple(part for part in args.hold_out_styles.split(",") if part)
    if not held_out and (saved := bundle.read_saved(args.model)) and saved.experiment:
        held_out = saved.experiment.data.hold_out_styles
    model, writer = runner.opened(args.model, local_mesh(args.model_devices))
    if request is not None:
        request = request.rated_by(writer)
    found = runner.run_suite(
        model,
        suite=args.suite,
        data_dir=args.data,
        languages=languages,
        batch_size=args.batch_size,
        hold_out_styles=held_out,
        writer=writer,
        request=request,
    )
    print(tables.table(found.metrics))
    _write(args, found)
    return 0


def _request(args: argparse.Namespace, languages: tuple[str, ...]) -> Any:
    """What the suites over data sets are told; ``None`` for the others."""
    from m2jax.eval import suites
    from m2jax.eval.sets import names
    from m2jax.eval.sets.records import Place

    if args.suite not in suites.SUITES or not args.data:
        return None
    data = _here(args.data, "--data")
    place = Place(
        data,
        args.split or suites.SUITES[args.suite].split,
        language=languages[0] if len(languages) == 1 else "",
        images=_here(args.images, "--images") if args.images else None,
        names=names.read_classes(args.classes) if args.classes else None,
        asked=bool(args.split),
    )
    return suites.Request(
        dataset_name(args.name, data) or args.suite,
        place,
        train_split=args.train_split,
        train_data=_here(args.train_data, "--train-data") if args.train_data else None,
        recipe=_recipe(args),
        languages=languages,
        templates=names.read_templates(args.templates) if args.templates else {},
        batch=args.batch_size,
        show=True,
    )


def _here(words: str, flag: str) -> Path:
    """A data set's path with its reader, if one is named; copied here where it lies on a store."""
    from m2jax.config import UserError
    from m2jax.data import stores
    from m2jax.eval import sets

    reader, colon, rest = words.partition(":")
    prefix, address = (f"{reader}:", rest) if colon and reader in sets.READERS else ("", words)
    if not stores.is_remote(address):
        return Path(words)
    if sets.SPLIT in address:
        raise UserError(f"{flag} {words}: {sets.SPLIT} stands in local paths alone: name each part")
    found = stores.matching([address], flag)
    if len(found) > 1:
        raise UserError(f"{flag} {words}: names {len(found)} files: name the folder they lie in")
    return Path(f"{prefix}{found[0]}")


def dataset_name(given: str, data: Path) -> str:
    """A data set's name in those of figures: as given, or the last part of its path, v1.5 whole.

    Raises:
        UserError: what was given has a slash or a space in it.
    """
    from m2jax.config import UserError

    if not re.fullmatch(r"[^/\s]*", given):
        raise UserError(f"--name {given}: goes into names of figures: leave out / and spaces")
    name = data.name.rpartition(":")[2]
    name = name.removesuffix(".jsonl").removesuffix(".tar")
    return given or re.sub(r"[^\w.-]+", "-", name).strip("-")


def _recipe(args: argparse.Namespace) -> Any:
    """How fine-tuning trains."""
    from m2jax.config import UserError
    from m2jax.eval.finetune import Recipe

    given = {"epochs": args.epochs, "learning_rate": args.learning_rate}
    given = {key: value for key, value in given.items() if value is not None}
    for key, value in given.items():
        if not 0 < value < math.inf:
            raise UserError(f"--{key.replace('_', '-')} {value}: must be above 0")
    return Recipe(**given)


def _write(args: argparse.Namespace, found: Any) -> None:
    """The files that were asked for."""
    from m2jax.eval import compare, tables

    if args.json:
        target = compare.examples_file(args.json)
        target.unlink(missing_ok=True)  # those of an evaluation before are not of this one
        if found.examples:
            fill = functools.partial(
                compare.write_examples, examples=found.examples, questions=found.questions
            )
            files.write(target, fill)
        text = json.dumps(found.metrics, indent=1, sort_keys=True) + "\n"
        files.write(args.json, lambda file: file.write(text.encode()))
    if args.markdown:
        text = tables.markdown(found.metrics)
        files.write(args.markdown, lambda file: file.write(text.encode()))
