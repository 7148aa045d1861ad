# SPDX-License-Identifier: Apache-2.0
"""``m2jax VERB ...``: finds the verb, runs it, turns errors into one line and an exit code."""

from __future__ import annotations

import argparse
import select
import sys
import traceback
from collections.abc import Sequence

from m2jax import __version__
from m2jax.cli import (
    compare,
    convert,
    data,
    doctor,
    embed,
    evaluate,
    explore,
    inspect,
    labels,
    launch,
    longtail,
    plan,
    reid,
    retrieval,
    train,
    video,
)
from m2jax.cli.terminal import printable
from m2jax.dist.host import restart_with_huge_pages

# Each has add_parser(subparsers) and run(args) -> exit code. None imports jax before it runs.
VERBS = (
    *(doctor, data, train, evaluate, compare, explore, embed, convert, inspect, plan, launch),
    *(video, retrieval, reid, labels, longtail),
)

# Verbs that hold much memory for long, and so gain from huge pages.
COMPUTES = {"train", "eval", "embed", "explore", "video", "reid", "labels", "longtail"}

EXIT_CODES = (
    "exit codes: 0 done, 1 the program failed, 2 wrong usage or bad input, "
    "3 a planned step does not fit, 4 an imported model failed its check, "
    "5 an upgrade of a retrieval model is not safe, "
    "42 preempted after a save (start again to go on), 43 the watchdog ended a stalled run"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the words after ``m2jax``; those of this process if not given.

    Returns:
        The exit code: 0 done, 1 the program failed, 2 bad input, 130 interrupted, or
        the verb's own.
    """
    if argv is None and sys.argv[1:2] and sys.argv[1] in COMPUTES:
        restart_with_huge_pages()
    words, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(words)
    if overrides and not hasattr(args, "config"):
        return _fail(f"--config.{overrides[0]}: this command takes no config: remove it", 2)
    args.overrides = overrides
    try:
        return args.run(args)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_left():
            sys.stderr.close()
            return 1
        return report(error, debug=args.debug)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line, for ``--help`` and for tests."""
    parser = argparse.ArgumentParser(
        prog="m2jax",
        description="Bilingual image-text pretraining in JAX.",
        epilog=EXIT_CODES,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"m2jax {__version__}")
    subparsers = parser.add_subparsers(dest="verb", required=True, metavar="COMMAND")
    for verb in VERBS:
        verb.add_parser(subparsers)
    for subparser in subparsers.choices.values():
        subparser.add_argument(
            "--debug", action="store_true", help="show the traceback of an error"
        )
    return parser


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Takes ``--config.a.b=V`` and ``--config.a.b V`` out of a command line.

    Returns:
        The other words, and the overrides as ``a.b=V`` in their order.
    """
    others: list[str] = []
    overrides: list[str] = []
    rest = iter(words)
    for word in rest:
        if not word.startswith("--config."):
            others.append(word)
            continue
        key = word.removeprefix("--config.")
        if "=" not in key:
            value = next(rest, None)
            key = key if value is None else f"{key}={value}"
        overrides.append(key)
    return others, overrides


def _reader_left() -> bool:
    """Whether nobody reads our output any more, as after ``| head``."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def report(error: Exception, *, debug: bool) -> int:
    """Prints an error the way its kind deserves; returns the exit code."""
    from m2jax.config import UserError

    if debug:
        traceback.print_exception(error)
    if isinstance(error, UserError):
        return _fail(str(error), 2)
    lines = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return _fail(f"{reason} (run with --debug for the traceback)", 1)


def _fail(message: str, code: int) -> int:
    print(f"m2jax: error: {printable(message)}", file=sys.stderr)
    return code
