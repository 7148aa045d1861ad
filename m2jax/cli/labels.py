# SPDX-License-Identifier: Apache-2.0
"""``m2jax labels``: finds any number of named labels in images, trained from text alone."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from m2jax.cli import files


def add_parser(subparsers: Any) -> None:
    """Declares the verb and its actions."""
    parser = subparsers.add_parser(
        "labels", help="find named labels in images, trained from text alone", allow_abbrev=False
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_train(actions)
    _add_predict(actions)
    _add_eval(actions)


def _add_train(actions: Any) -> None:
    parser = actions.add_parser(
        "train",
        help="train an adapter on sentences",
        description="Writes sentences about the labels (by a grammar, or by a language model with "
        "--llm), trains an adapter on the model's text features, and sets thresholds. No image is "
        "needed.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, help="a model or work directory, hf:OWNER/NAME")
    parser.add_argument(
        "--labels",
        required=True,
        type=Path,
        metavar="FILE",
        help="one label per line; a name in the other language after a tab, others after a bar",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the adapter")
    parser.add_argument("--languages", default="", help="en,zh (default: all that labels share)")
    parser.add_argument("--sentences", type=int, default=0, help="(default: 40 per label)")
    parser.add_argument(
        "--kind", default="mlp", help="mlp (default), or residual: takes new labels"
    )
    parser.add_argument("--normalize", default="", help="none or l2 (default: as the model allows)")
    parser.add_argument("--noise", default="gaussian", help="gaussian (default), uniform, sphere")
    parser.add_argument(
        "--sigma", type=float, help="size of the noise (mlp: 0.126, residual: 0.25)"
    )
    parser.add_argument("--loss", default="ranking", help="ranking (default), asymmetric, bce")
    parser.add_argument(
        "--epochs", type=int, default=20, help="at least, and 600 steps (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    llm = parser.add_argument_group("sentences by a language model")
    llm.add_argument(
        "--llm", default="", metavar="URL", help="https://HOST/v1, of chat completions"
    )
    llm.add_argument("--llm-model", default="", metavar="NAME")
    llm.add_argument("--llm-key-env", default="OPENAI_API_KEY", metavar="VARIABLE")
    llm.add_argument("--llm-per-minute", type=float, default=60.0, metavar="N")
    llm.add_argument(
        "--corpus", type=Path, metavar="DIR", help="where prompts and answers are kept; goes on"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=train)


def _add_predict(actions: Any) -> None:
    parser = actions.add_parser(
        "predict", help="labels of images, as JSON and as a page", allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="the model the adapter was trained on")
    parser.add_argument("--adapter", required=True, type=Path, metavar="DIR")
    parser.add_argument("--images", required=True, nargs="+", type=Path, metavar="PATH")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.json")
    parser.add_argument("--html", type=Path, metavar="FILE.html", help="a page with the images")
    parser.add_argument("--top", type=int, default=5, help="labels listed at least (%(default)s)")
    parser.add_argument("--labels", type=Path, metavar="FILE", help="other labels; kind residual")
    parser.add_argument("--batch-size", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=predict)


def _add_eval(actions: Any) -> None:
    parser = actions.add_parser(
        "eval",
        help="score an adapter on VOC 2007, COCO, NUS-WIDE, or other images with labels",
        description="mAP, CF1 and OF1 of an adapter (thresholds from text, and the three best), "
        "zero-shot and chance beside them. Classes are found among the adapter's labels by name.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, help="the model the adapter was trained on")
    parser.add_argument("--adapter", required=True, type=Path, metavar="DIR")
    parser.add_argument(
        "--data",
        required=True,
        metavar="READER:PATH",
        help="voc2007:DIR, coco-objects:DIR, nus-wide:DIR, or what `m2jax eval` reads",
    )
    parser.add_argument("--split", default="", help="(default: test; COCO's is val2014)")
    parser.add_argument("--images", type=Path, metavar="DIR", help="where paths of images start")
    parser.add_argument(
        "--classes", type=Path, metavar="FILE", help="names of classes: lines, or JSON by language"
    )
    parser.add_argument("--name", default="", help="of the data set in the names of figures")
    parser.add_argument("--by", default="adapter", help="adapter (default), or both: + zero-shot")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--batch-size", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=evaluate)


def train(args: argparse.Namespace) -> int:
    """Sentences, features, training; writes the adapter."""
    from m2jax import bundle
    from m2jax.checkpoint.folder import check_absent
    from m2jax.config import UserError
    from m2jax.dist.host import load_devices
    from m2jax.tasks.labels import corpus, features, mentions, saved, thresholds, vocabulary
    from m2jax.tasks.labels import train as train_lib
    from m2jax.tasks.labels.adapter import SIGMA, Settings

    check_absent(args.out)
    words = vocabulary.read(args.labels)
    mentions.Finder(words, f"--labels {args.labels}")  # refuses names before the model is loaded
    languages = train_lib.languages_of(words, [x for x in args.languages.split(",") if x])
    if args.sentences and args.sentences < 2:
        raise UserError(f"--sentences {args.sentences}: must be at least 2")
    made = {
        name: getattr(args, name)
        for name in ("kind", "noise", "loss", "epochs", "seed", "normalize")
    }
    made["sigma"] = SIGMA.get(args.kind, 0.0) if args.sigma is None else args.sigma
    settings = Settings(**{**made, "normalize": args.normalize or "l2"})
    writer = _writer(args)
    order = corpus.Order(words, languages, args.sentences or 40 * len(words), args.seed)
    load_devices()
    model = bundle.load(args.model)
    if not args.normalize and features.has_length(model):
        settings = Settings(**{**made, "normalize": "none"})
    vocabulary.check_length(model, words, f"--labels {args.labels}")
    texts = (
        corpus.written(order, args.corpus, writer, _progress) if writer else corpus.offline(order)
    )
    if writer:
        print(file=sys.stderr)
    found = train_lib.fit(model, words, texts, languages, settings)
    saved.write(args.out, found)
    report = found.report
    print(
        f"{args.out}: {len(words):,} labels, {report['sentences']:,} sentences, trained in "
        f"{report['train_s']:.1f} s; on held-out sentences mAP {100 * report['text_map']:.1f}"
    )
    if report["cut_off"]:
        print(
            f"{report['cut_off']:,} sentences are longer than the model's text and were left out",
            file=sys.stderr,
        )
    if (others := len(words) - report["own_thresholds"]) > 0:
        print(
            f"{others:,} labels have no threshold of their own, as fewer than "
            f"{thresholds.FEWEST} held-out sentences name them",
            file=sys.stderr,
        )
    if report["never_named"]:
        print(f"in no sentence: {', '.join(report['never_named'][:10])}", file=sys.stderr)
    return 0


def predict(args: argparse.Namespace) -> int:
    """Scores images and writes what was found."""
    from m2jax import bundle
    from m2jax.cli.embed import image_files
    from m2jax.config import UserError
    from m2jax.dist.host import load_devices
    from m2jax.eval.sets.records import Files
    from m2jax.tasks.labels import predict as predict_lib
    from m2jax.tasks.labels import saved, vocabulary

    files.check_outputs(args.out, args.html)
    for flag, value in (("--top", args.top), ("--batch-size", args.batch_size)):
        if value < 1:
            raise UserError(f"{flag} {value}: must be at least 1")
    paths = image_files(args.images)
    adapter = saved.read(args.adapter)
    words = vocabulary.read(args.labels) if args.labels else None
    load_devices()
    model = bundle.load(args.model)
    if words is not None:
        adapter = predict_lib.with_labels(model, adapter, words)
    pictures = Files(paths)
    found = predict_lib.predict(
        model, adapter, pictures, top=args.top, batch=args.batch_size, show=True
    )
    rows = predict_lib.as_json([str(path) for path in paths], found)
    content = json.dumps(rows, ensure_ascii=False, indent=1) + "\n"
    files.write(args.out, lambda file: file.write(content.encode()))
    if args.html is not None:
        text = predict_lib.as_page([str(path) for path in paths], pictures, found)
        files.write(args.html, lambda file: file.write(text.encode()))
    print(f"{args.out}: {len(rows)} images, {sum(len(r['labels']) for r in rows)} labels")
    return 0


def evaluate(args: argparse.Namespace) -> int:
    """Scores an adapter, prints the table, writes the figures."""
    from m2jax import bundle
    from m2jax.cli.evaluate import dataset_name
    from m2jax.config import UserError
    from m2jax.dist.host import load_devices
    from m2jax.eval import sets, tables
    from m2jax.eval.sets import names
    from m2jax.eval.sets.records import Place
    from m2jax.tasks.labels import evaluate as evaluate_lib
    from m2jax.tasks.labels import saved

    if args.json:
        files.check_parent(args.json, "--json")
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: must be at least 1")
    if args.by not in ("adapter", "both"):
        raise UserError(f"--by {args.by}: use adapter or both")
    adapter = saved.read(args.adapter)
    given = names.read_classes(args.classes) if args.classes else None
    path, split = Path(args.data), args.split or "test"
    data = sets.read(Place(path, split, images=args.images, names=given, asked=bool(args.split)))
    load_devices()
    found = evaluate_lib.score(
        bundle.load(args.model),
        adapter,
        data,
        name=dataset_name(args.name, path),
        by=args.by,
        batch=args.batch_size,
        show=True,
    )
    print(tables.table(found))
    if args.json:
        text = json.dumps(found, indent=1, sort_keys=True) + "\n"
        files.write(args.json, lambda file: file.write(text.encode()))
    return 0


def _writer(args: argparse.Namespace) -> Any:
    """The language model that was named; ``None`` for the grammar."""
    from m2jax.config import UserError
    from m2jax.tasks.labels.client import ChatClient

    if not args.llm:
        if args.corpus or args.llm_model:
            raise UserError("--corpus, --llm-model: go with a language model: name it with --llm")
        return None
    if not args.llm_model or not args.corpus:
        raise UserError(f"--llm {args.llm}: name the model with --llm-model and --corpus DIR")
    return ChatClient(
        args.llm, args.llm_model, key_env=args.llm_key_env, per_minute=args.llm_per_minute
    )


def _progress(line: str) -> None:
    print(f"\r{line}", end="", file=sys.stderr, flush=True)
