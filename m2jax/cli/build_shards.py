# SPDX-License-Identifier: Apache-2.0
"""``m2jax data build shards``: raw collections to cleaned training shards."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

KINDS = "tars, parquet, tsv64 (Chinese-CLIP's .._imgs.tsv), lmdb (Chinese-CLIP's folders), coco"

# Flag, type, default and help of what makes a record good; the defaults are those of the library
# (tests compare them), which is not imported before the command runs.
LIMITS: tuple[tuple[str, type, Any, str], ...] = (
    ("--aspect", float, 3.0, "longer side by shorter, at most"),
    ("--min-side", int, 32, "pixels of the shorter side"),
    ("--min-text", int, 5, "characters of a caption, at least"),
    ("--max-text", int, 1000, "and at most"),
    ("--script", str, "simplified", "of Chinese: simplified, traditional or keep"),
)
DUPLICATES: tuple[tuple[str, type, Any, str], ...] = (
    ("--near", str, "both", "what must be alike in near duplicates: both, image, text or none"),
    ("--image-bits", int, 28, "of 256 in which the hashes of alike images differ, at most"),
    ("--jaccard", float, 0.7, "share of common three-character pieces of alike captions"),
    (
        "--evaluation-text",
        int,
        30,
        "letters (Han: 3) from which its captions are kept out",
    ),
    ("--pass-records", int, 20_000, "records whose signatures are shuffled at a time; 0: all"),
)


def add_parser(sets: Any) -> None:
    """Declares the data set."""
    parser = sets.add_parser(
        "shards",
        help="cleaned, deduplicated ArrayRecord shards of your own collections",
        description="Reads collections, sets bad records aside with their reasons, removes "
        "duplicates and what evaluation sets show, and writes shards that training and TFDS read, "
        "with manifest.json. Started again it goes on where it was. What follows -- goes to "
        "Apache Beam, as in -- --runner=SparkRunner.",
        allow_abbrev=False,
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument(
        "--source",
        action="append",
        default=[],
        metavar="NAME=KIND:FILES",
        help=f"a collection; KIND is one of {KINDS}; FILES paths or patterns with commas between",
    )
    parser.add_argument(
        "--evaluation",
        action="append",
        default=[],
        metavar="NAME=KIND:FILES",
        help="an evaluation set, whose images and captions are kept out",
    )
    for flag, what in (
        ("--weight", "copies of each record of a source; 0.25 keeps one in four (default: 1)"),
        ("--licence", "of a source, for the record and the manifest"),
        (
            "--language",
            "en or zh: of captions of a source that do not say theirs (default: identified)",
        ),
    ):
        parser.add_argument(flag, action="append", default=[], metavar="NAME=VALUE", help=what)
    for flag, kind, default, what in (*LIMITS, *DUPLICATES):
        parser.add_argument(flag, type=kind, default=default, help=f"{what} (default: {default})")
    _add_scoring(parser)
    parser.add_argument("--shard-records", type=int, default=10_000, help="default: 10,000")
    parser.add_argument("--seed", type=int, default=0, help="of the order (default: 0)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("beam", nargs="*", metavar="-- BEAM OPTIONS", help="Apache Beam's own")
    parser.set_defaults(run=run)


def _add_scoring(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--score-model", default="", metavar="DIR", help="scores every pair")
    parser.add_argument("--score-below", type=float, default=0.25, help="low (default: 0.25)")
    parser.add_argument(
        "--low-score", default="", help="rewrite, drop or keep low pairs (default: rewrite)"
    )
    parser.add_argument(
        "--captioner",
        default="",
        metavar="DIR|MODULE:NAME",
        help="writes captions anew: a run with a caption head, or a callable that makes yours "
        "(default: the scoring model, where it can write)",
    )
    parser.add_argument("--score-batch", type=int, default=64, help="pairs at once (default: 64)")


def run(args: argparse.Namespace) -> int:
    """Builds, and prints what became of the records."""
    from m2jax.config import UserError
    from m2jax.data.build import INSTALL

    logging.getLogger("apache_beam").setLevel(logging.CRITICAL)  # errors come as exceptions too
    logging.disable(logging.WARNING)  # Beam complains of what it looks for in vain
    try:
        from m2jax.data.build import manifest, pipeline
    except ModuleNotFoundError as error:
        raise UserError(f"data build shards: needs {error.name}: {INSTALL}") from error
    finally:
        logging.disable(logging.NOTSET)
    plan, models = planned(args)
    found = pipeline.build(
        plan, models=models, beam_options=args.beam, say=lambda line: print(line, file=sys.stderr)
    )
    print(manifest.summary(found))
    print(args.out)
    return 0


def planned(args: argparse.Namespace) -> tuple[Any, Any]:
    """The plan and the models that the words ask for.

    Raises:
        UserError: a source that is no NAME=KIND:FILES, a value for none, or no captioner.
    """
    from m2jax.config import UserError
    from m2jax.data.build import plan as lib
    from m2jax.data.build.steps import Limits

    def chosen(flags: Sequence[tuple[str, type, Any, str]]) -> dict[str, Any]:
        names = [flag.removeprefix("--").replace("-", "_") for flag, *_ in flags]
        return {name: getattr(args, name) for name in names}

    sources = [_source(words, evaluation=False) for words in args.source]
    sources += [_source(words, evaluation=True) for words in args.evaluation]
    names = {source.name for source in sources}
    for flag in ("weight", "licence", "language"):
        given = dict(_pair(f"--{flag}", words, "VALUE") for words in getattr(args, flag))
        if unknown := sorted(set(given) - names):
            raise UserError(f"--{flag} {unknown[0]}: no such source: name one of {sorted(names)}")
        if flag == "weight":
            given = {name: _number(f"--weight {name}", value) for name, value in given.items()}
        sources = [s._replace(**{flag: given.get(s.name, getattr(s, flag))}) for s in sources]
    scoring, models = _scoring(args)
    plan = lib.Plan(
        args.out,
        tuple(sources),
        Limits(**chosen(LIMITS)),
        lib.Duplicates(**chosen(DUPLICATES)),
        scoring,
        args.shard_records,
        args.seed,
    )
    return plan, models


def _pair(flag: str, words: str, what: str) -> tuple[str, str]:
    from m2jax.config import UserError

    name, equals, value = words.partition("=")
    if not equals or not value or not name.replace("-", "").replace("_", "").isalnum():
        raise UserError(f"{flag} {words}: write NAME={what}, the name in letters and digits")
    return name, value


def _number(where: str, value: str) -> float:
    from m2jax.config import UserError

    try:
        return float(value)
    except ValueError:
        raise UserError(f"{where}: {value!r} is no number: mend it") from None


def _source(words: str, *, evaluation: bool) -> Any:
    """A source of its words."""
    from m2jax.config import UserError
    from m2jax.data import stores
    from m2jax.data.build import readers
    from m2jax.data.build.readers.base import Source

    flag = "--evaluation" if evaluation else "--source"
    name, rest = _pair(flag, words, "KIND:FILES")
    kind, colon, patterns = rest.partition(":")
    if not colon or kind not in readers.KINDS:
        raise UserError(f"{flag} {words}: write NAME=KIND:FILES with KIND one of {KINDS}")
    files = stores.matching(patterns.split(","), f"{flag} {name}")
    return Source(name, kind, tuple(dict.fromkeys(files)), evaluation=evaluation)


def _writes(flag: str, model: str) -> bool:
    """Whether a model has a caption head."""
    from m2jax.captioner import can_write
    from m2jax.config import UserError

    try:
        return can_write(model)
    except UserError as error:
        raise UserError(f"{flag} {model}: {error}") from None


def _scoring(args: argparse.Namespace) -> tuple[Any, Any]:
    """What is done about low scores, and by which models."""
    from m2jax.config import UserError
    from m2jax.data.build.plan import Scoring
    from m2jax.data.build.stage_score import Models

    if not args.score_model:
        if args.captioner or args.low_score:
            raise UserError("--captioner, --low-score: no scores to judge by: add --score-model")
        return Scoring(), Models()
    if args.score_batch < 1:
        raise UserError(f"--score-batch {args.score_batch}: must be at least 1")
    from m2jax.cli import build_models

    low = args.low_score or "rewrite"
    captioner = args.captioner or (
        args.score_model if _writes("--score-model", args.score_model) else ""
    )
    rewriter = None
    if low == "rewrite":
        if not captioner:
            raise UserError(
                f"--score-model {args.score_model}: cannot write captions: add --captioner, or say "
                "--low-score drop or keep"
            )
        own = ":" in captioner and not Path(captioner).exists()
        if not own and not _writes("--captioner", captioner):
            raise UserError(f"--captioner {captioner}: no run with a caption head: name another")
        named = build_models.Named(captioner)
        if own:
            named.find()  # before hours of reading
        made = build_models.CaptionRewriter(captioner, args.score_batch)
        rewriter = named if own else build_models.Made(made)
    build_models.check(args.score_model)
    scorer = build_models.Made(build_models.BundleScorer(args.score_model, args.score_batch))
    scoring = Scoring(args.score_model, captioner, args.score_below, low, args.score_batch)
    return scoring, Models(scorer, rewriter)
