# SPDX-License-Identifier: Apache-2.0
"""``m2jax retrieval``: models whose vectors live together, their database, when to upgrade."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from m2jax.cli import files, retrieval_train

NOT_SAFE = 5


def add_parser(subparsers: Any) -> None:
    """Declares the verb and its parts."""
    parser = subparsers.add_parser(
        "retrieval", help="train compatible models, index and search vectors, upgrade safely"
    )
    parts = parser.add_subparsers(dest="part", required=True, metavar="PART")
    retrieval_train.add_parser(parts)
    index = parts.add_parser(
        "index",
        help="store features, or replace those of an older model",
        description="Gives each item its vector of a version. On items of another version this is "
        "the backfill of an upgrade: it may run while the database is searched, and be stopped or "
        "killed and started again; every item has one vector at any time.",
        allow_abbrev=False,
    )
    search = parts.add_parser(
        "search",
        help="nearest items of queries, over all versions",
        description="Writes one JSON line per query: id and hits of id, score and version.",
        allow_abbrev=False,
    )
    for each in (index, search):
        each.add_argument(
            "--features", nargs="+", type=Path, required=True, metavar="FILE.npz",
            help="made by m2jax embed: features [n, dim] and ids [n]",
        )  # fmt: skip
        each.add_argument("--uri", default="milvus.db", help="NAME.db (embedded) or http://...")
        each.add_argument("--collection", default="items", help="default: items")
        each.add_argument("--token", default="", help="of a cluster that asks for one")
    index.add_argument("--version", required=True, help="name of the model that made them")
    index.add_argument("--batch", type=int, default=1000, help="items of one write")
    index.add_argument("--pause", type=float, default=0.0, help="seconds between writes")
    index.add_argument(
        "--index", default="", help="of a new collection: FLAT (exact, default), HNSW, AUTOINDEX"
    )
    search.add_argument("--k", type=int, default=10, help="items of an answer")
    search.add_argument("--versions", nargs="+", default=[], help="only these (default: all)")
    search.add_argument("--out", type=Path, metavar="FILE.jsonl", help="default: the terminal")
    for each in (index, search, *_add_measures(parts)):
        each.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run)


def _add_measures(parts: Any) -> tuple[Any, Any]:
    measure = parts.add_parser(
        "eval",
        help="mAP of one model's features on ROxford, RParis, Google Landmarks v2 or your own set",
        description="Scores features that m2jax embed made of query and gallery images. By the "
        "data set's own file: easy, medium and hard mAP for gnd_roxford5k.pkl and "
        "gnd_rparis6k.pkl, mAP@100 of the private queries for retrieval_solution_v2.1.csv; or by "
        "a truth.json of yours.",
        allow_abbrev=False,
    )
    for side in ("queries", "gallery"):
        measure.add_argument(
            f"--{side}", nargs="+", type=Path, required=True, metavar="FILE.npz",
            help="may hold other images too" if side == "queries" else "may be the same files",
        )  # fmt: skip
    measure.add_argument(
        "--truth", type=Path, required=True, metavar="FILE", help="says what is right"
    )
    report = parts.add_parser(
        "upgrade-report",
        help="self-test, cross-test, compatibility scores; exit 5: not safe",
        description="Each folder is a data set with old_queries.npz, old_gallery.npz, "
        "new_queries.npz, new_gallery.npz (and alone_*.npz of a new model trained alone) made by "
        "m2jax embed, and truth.json or what the data set publishes: gnd_roxford5k.pkl, "
        "gnd_rparis6k.pkl, retrieval_solution_v2.1.csv. Exit 5 when something speaks against the "
        "upgrade.",
        allow_abbrev=False,
    )
    report.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    report.add_argument(
        "--margin", type=float, default=0.0, help="that the cross-test must be above by"
    )
    for each in (measure, report):
        each.add_argument("--k", type=int, default=100, help="of mAP@k (default: 100)")
        each.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    return measure, report


def run(args: argparse.Namespace) -> int:
    """Runs one part."""
    parts = {
        "train-compatible": retrieval_train.run,
        "index": run_index,
        "search": run_search,
        "eval": run_eval,
        "upgrade-report": run_report,
    }
    return parts[args.part](args)


def run_index(args: argparse.Namespace) -> int:
    """Stores features; says what was added, replaced and there already."""
    from m2jax.tasks.retrieval.backfill import Progress, backfill, check_pace, read_features
    from m2jax.tasks.retrieval.store import Store, check_index, checked_version

    checked_version(args.version)
    check_index(args.index)
    check_pace(args.batch, args.pause)  # all three before a database is made
    features = read_features(args.features)

    def say(done: Progress) -> None:
        print(f"\r{done.seen:,}/{len(features.ids):,}", end="", file=sys.stderr, flush=True)

    def warn(line: str) -> None:
        print(f"warning: {line}", file=sys.stderr)

    pace = {"batch": args.batch, "pause": args.pause}
    with Store(args.uri, args.collection, args.token) as store:
        store.create(features.vectors.shape[1], index=args.index)
        done = backfill(store, features, args.version, **pace, say=say, warn=warn)
        print(file=sys.stderr)
        print(
            f"{args.collection}: {done.added:,} added, {done.replaced:,} replaced, "
            f"{done.passed:,} there already; {store.count():,} items, "
            f"{store.count(args.version):,} of version {args.version}"
        )
    return 0


def run_search(args: argparse.Namespace) -> int:
    """Answers queries."""
    from m2jax.config import UserError
    from m2jax.tasks.retrieval.backfill import read_features
    from m2jax.tasks.retrieval.store import Store

    if args.k < 1:
        raise UserError(f"--k {args.k}: must be at least 1")
    if args.out:
        files.check_parent(args.out, "--out")
    if "://" not in args.uri and not Path(args.uri).exists():  # to open it would make it
        raise UserError(f"--uri {args.uri}: no such database: m2jax retrieval index makes it")
    queries = read_features(args.features)
    lines = []
    with Store(args.uri, args.collection, args.token) as store:
        answers = store.search(queries.vectors, args.k, args.versions)
    for name, answer in zip(queries.ids, answers, strict=True):
        hits = [each._asdict() for each in answer]
        lines.append(json.dumps({"id": name, "hits": hits}, ensure_ascii=False))
    text = "".join(f"{line}\n" for line in lines)
    if args.out:
        files.write(args.out, lambda file: file.write(text.encode()))
    else:
        print(text, end="")
    return 0


def run_eval(args: argparse.Namespace) -> int:
    """Prints the figures of one model."""
    from m2jax.config import UserError
    from m2jax.dist.host import load_devices
    from m2jax.tasks.retrieval import truth as truth_lib
    from m2jax.tasks.retrieval.backfill import in_order, read_features

    if args.k < 1:
        raise UserError(f"--k {args.k}: must be at least 1")
    if args.json:
        files.check_parent(args.json, "--json")
    queries, gallery = read_features(args.queries), read_features(args.gallery)
    dims = queries.vectors.shape[1], gallery.vectors.shape[1]
    if dims[0] != dims[1]:
        raise UserError(
            f"--queries: vectors of {dims[0]} numbers, the gallery's have {dims[1]}: embed both "
            "with one model"
        )
    truth = truth_lib.read(args.truth, queries.ids, gallery.ids)
    load_devices()
    sides = in_order(queries, truth.queries), in_order(gallery, truth.gallery)
    found = truth_lib.figures(truth, *sides, k=args.k)
    told = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
    print(f"{told} over {len(truth.queries):,} queries and {len(truth.gallery):,} items")
    if args.json:
        text = json.dumps(found, indent=1) + "\n"
        files.write(args.json, lambda file: file.write(text.encode()))
    return 0


def run_report(args: argparse.Namespace) -> int:
    """Prints the figures of each data set and the verdict."""
    from m2jax.dist.host import load_devices
    from m2jax.tasks.retrieval.upgrade import judge

    if args.json:
        files.check_parent(args.json, "--json")
    load_devices()
    report = judge(args.folders, k=args.k, margin=args.margin)
    for each in report.sets:
        alone = "" if each.alone is None else f", trained alone {each.alone:.4f}"
        print(
            f"{each.name} ({each.metric}): old {each.old:.4f}, new {each.new:.4f}, "
            f"cross {each.cross:.4f}, half filled {each.mixed:.4f}{alone}"
        )
        for reason in each.against:
            print(f"  against: {reason}")
    if report.scores:
        p = report.scores
        print(f"P_up {p.p_up:.2f}, P_comp {p.p_comp:.2f}, P_1 {p.p_1:.2f}")
    elif any(each.alone is not None for each in report.sets):
        print("no scores: not every set has a model trained alone that is better than the old one")
    print("safe: the new model can search the stored vectors" if report.safe else "not safe")
    if args.json:
        found = {
            "safe": report.safe,
            "scores": report.scores and report.scores._asdict(),
            "sets": {each.name: each._asdict() for each in report.sets},
        }
        text = json.dumps(found, indent=1) + "\n"
        files.write(args.json, lambda file: file.write(text.encode()))
    return 0 if report.safe else NOT_SAFE
