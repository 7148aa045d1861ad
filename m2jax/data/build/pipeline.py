# SPDX-License-Identifier: Apache-2.0
"""The build, top to bottom: read and check, find duplicates, score, list, write, sum up.

Each stage is a Beam pipeline over units of work whose results are files that appear whole. A unit
that is done is not done again, so a killed build goes on; nothing depends on which worker did what
or when, so two builds of the same input are the same bytes.
"""

from __future__ import annotations

import abc
import collections
import contextlib
import io
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import apache_beam as beam
from apache_beam.metrics import Metrics
from apache_beam.options.pipeline_options import PipelineOptions

from m2jax.config import UserError
from m2jax.data.build import duplicates, manifest, shards, stage_read, stage_score, work
from m2jax.data.build import plan as plan_lib
from m2jax.data.build.plan import Plan
from m2jax.data.build.readers.base import Unit
from m2jax.data.build.stage_score import Models

FINGERPRINT = "fingerprint.json"
EVERY_S = 10.0  # between lines of progress
_WHERE = re.compile(r" \[while running '[^']*'\]$")  # that Beam adds to a worker's error
NO_MODELS = Models()
Say = Callable[[str], None]


def build(
    plan: Plan,
    *,
    models: Models = NO_MODELS,
    beam_options: Sequence[str] = (),
    say: Say = print,
) -> dict[str, Any]:
    """Builds the shards, or goes on with a build that was interrupted.

    Args:
        plan: what to build.
        models: scorer and rewriter, where ``plan.scoring`` asks for them.
        beam_options: Beam's own, such as ``--runner=SparkRunner``; all workers must see the files
            of the sources and the output folder under the same paths.
        say: gets a line now and then.

    Returns:
        The manifest.

    Raises:
        UserError: a plan that cannot be, files that cannot be opened, or a folder that holds
            something else.
    """
    plan_lib.check(plan)
    _check_options(beam_options)
    if (plan.scoring.model != "") != (models.scorer is not None):
        raise UserError("--score-model: a scorer must come with the plan that names it")
    if plan.scoring.low == "rewrite" and models.rewriter is None:
        raise UserError("--low-score rewrite: nothing to write with: name a --captioner")
    if (plan.out / manifest.MANIFEST).exists():
        return _built(plan)
    units = plan_lib.units(plan)  # may refuse files, so it comes before anything is written
    _claim(plan, plan_lib.fingerprint(plan))
    say(f"build: {len(units)} units of work from {len(plan.sources)} sources")
    counts: dict[int, collections.Counter[str]] = {
        ordinal: collections.Counter() for ordinal in range(len(units))
    }
    stage = _Stage(beam_options, say)
    _add(counts, stage.run("read", _Read(plan, units), range(len(units))))
    parts = _find(plan, units, counts, stage)
    ours = [n for n, unit in enumerate(units) if not plan.sources[unit.source].evaluation]
    if models.scorer is not None:
        _add(counts, stage.run("score", _Score(plan, models, parts), ours))
    found = stage.run("list", _List(plan, units, parts), ours)
    records = sum(result.pop("rows") for result in found.values())
    _add(counts, found)
    count = max(1, round(records / plan.shard_records))
    stated = stage.run("shards", _Write(plan, ours, count), range(count))
    return manifest.write(plan, units, counts, [stated[i] for i in range(count)])


def _check_options(words: Sequence[str]) -> None:
    """Refuses what Beam would pass over in silence.

    Raises:
        UserError: an option that Beam does not know.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):  # argparse prints pages and ends the process
            options = PipelineOptions(list(words))
            known = options.get_all_options()
            every = options.get_all_options(retain_unknown_options=True)
    except SystemExit:
        why = (said.getvalue().strip().splitlines() or ["refused"])[-1].partition("error: ")[-1]
        raise UserError(f"-- {' '.join(words)}: {why or 'refused by Beam'}: mend it") from None
    unknown = sorted(set(every) - set(known))
    if unknown or (words and not words[0].startswith("-")):
        raise UserError(
            f"-- {' '.join(words)}: Beam knows no option {(unknown or words)[0]}: mend it"
        )


def _claim(plan: Plan, mark: str) -> None:
    """Takes the work folder for this build.

    Raises:
        UserError: another build lies there, or the folder cannot be written.
    """
    file = plan.work / FINGERPRINT
    try:
        if plan.out.exists() and not plan.work.exists() and any(plan.out.iterdir()):
            raise UserError(f"--out {plan.out}: holds other files: name an empty or a new folder")
        plan.work.mkdir(parents=True, exist_ok=True)
        if file.exists() and work.read_json(file) != mark:
            raise UserError(
                f"--out {plan.out}: holds half of a build with other settings or inputs: remove it "
                "or name another folder"
            )
        temporary = file.with_suffix(".tmp")
        work.write_json(temporary, mark)
        temporary.replace(file)
    except (OSError, ValueError) as error:
        raise UserError(f"--out {plan.out}: {error}: choose another folder") from error


def _built(plan: Plan) -> dict[str, Any]:
    """The manifest of a build that is done already, if it is the same."""
    found = manifest.read(plan.out)
    if found.get("fingerprint") != plan_lib.fingerprint(plan):
        raise UserError(
            f"--out {plan.out}: holds another build, with other settings or inputs: name another "
            "folder"
        )
    shutil.rmtree(plan.work, ignore_errors=True)  # left by a kill in the last moment
    return found


def _add(
    counts: Mapping[int, collections.Counter[str]], found: Mapping[int, Mapping[str, int]]
) -> None:
    for ordinal, numbers in found.items():
        counts[ordinal].update(numbers)


def _find(
    plan: Plan,
    units: Sequence[Unit],
    counts: Mapping[int, Mapping[str, int]],
    stage: _Stage,
) -> int:
    """Finds duplicates in as many passes as keep memory flat; returns how many."""
    each = plan.duplicates.pass_records
    passed = sum(c[stage_read.PASSED] for c in counts.values())
    parts = max(1, -(-passed // each)) if each else 1
    elements = [(n, plan.sources[unit.source].evaluation) for n, unit in enumerate(units)]
    for part in range(parts):
        done = plan.work / "duplicates" / f"done-{part:04d}-of-{parts:04d}.json"
        if not done.exists():
            stage.say(f"build: duplicates, pass {part + 1} of {parts}")
            with stage.pipeline() as pipeline:
                duplicates.find(pipeline, plan, elements, part, parts)
            done.parent.mkdir(exist_ok=True)  # a pass without findings leaves no file
            work.write_json(done, parts)
    return parts


class _Stage:
    """Runs pieces of work in Beam."""

    def __init__(self, options: Sequence[str], say: Say) -> None:
        self._options, self.say = list(options), say

    @contextlib.contextmanager
    def pipeline(self) -> Iterator[beam.Pipeline]:
        """A pipeline with the user's options, which runs as the block ends.

        Raises:
            UserError: a worker raised it.
            RuntimeError: a worker that is another process failed in some other way.
        """
        try:
            with beam.Pipeline(options=PipelineOptions(self._options)) as pipeline:
                yield pipeline
        except Exception as error:
            raise _told(error) from error

    def run(self, name: str, work_of: _Work, pieces: Sequence[int]) -> dict[int, dict[str, Any]]:
        """All pieces of a stage; returns the result of each, read from its files at the end."""
        self.say(f"build: {name}, {len(pieces)} pieces")
        left = [piece for piece in pieces if not work_of.done(piece)]
        with self._progress(name, work_of, left), self.pipeline() as pipeline:
            _ = (
                pipeline
                | "pieces" >> beam.Create(left)
                | "spread" >> beam.Reshuffle()
                | name >> beam.ParDo(_Do(name, work_of))
            )
        return {piece: work_of(piece) for piece in pieces}

    @contextlib.contextmanager
    def _progress(self, name: str, work_of: _Work, left: Sequence[int]) -> Iterator[None]:
        """Says how many pieces are done, on whichever machines."""
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(EVERY_S):
                done = sum(map(work_of.done, left))
                self.say(f"build: {name}, {done} of {len(left)} pieces done")

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()


def _told(error: Exception) -> Exception:
    """What a worker raised, without what Beam adds to it.

    Of one that is another process Beam knows a traceback's text, whose last line says what it was.
    """
    lines = [line for line in str(error).splitlines() if line.strip()]
    last = _WHERE.sub("", lines[-1]) if lines else ""
    if isinstance(error, UserError):
        return UserError(last)
    if not (lines and lines[0].startswith("Traceback")):
        return error
    kind, _, message = last.partition(": ")
    if kind == f"{UserError.__module__}.{UserError.__qualname__}":
        return UserError(message)
    return RuntimeError(f"a worker failed: {last}")


class _Do(beam.DoFn):
    """Does one piece.

    Beam may do it twice, so its counters are for looking at alone: those of the manifest are read
    from the files.
    """

    def __init__(self, name: str, work_of: _Work) -> None:
        self._name, self._work = name, work_of

    def process(self, element: int) -> None:
        """A piece's number."""
        for reason, number in self._work(element).items():
            if isinstance(number, int):
                Metrics.counter("m2jax.build", f"{self._name}: {reason}").inc(number)


class _Work(abc.ABC):
    """What a stage does with a piece; called again, it gives what was done."""

    folder: str

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def done(self, piece: int) -> bool:
        """Whether its files are there."""
        width = 5 if self.folder == "shards" else 6
        return (self.plan.work / self.folder / f"{piece:0{width}d}" / stage_read.COUNTS).exists()

    @abc.abstractmethod
    def __call__(self, piece: int) -> dict[str, Any]:
        """Does it; returns its counts, and whatever else its files say."""


class _Read(_Work):
    folder = "read"

    def __init__(self, plan: Plan, units: Sequence[Unit]) -> None:
        super().__init__(plan)
        self.units = list(units)

    def __call__(self, piece: int) -> dict[str, Any]:
        return stage_read.read_unit(self.plan, piece, self.units[piece])


class _Score(_Work):
    folder = "score"

    def __init__(self, plan: Plan, models: Models, parts: int) -> None:
        super().__init__(plan)
        self.models, self.parts = models, parts

    def __call__(self, piece: int) -> dict[str, Any]:
        return stage_score.score_unit(self.plan, self.models, piece, self.parts)


class _List(_Work):
    folder = "list"

    def __init__(self, plan: Plan, units: Sequence[Unit], parts: int) -> None:
        super().__init__(plan)
        self.units, self.parts = list(units), parts

    def __call__(self, piece: int) -> dict[str, Any]:
        rows, counts = shards.list_unit(self.plan, piece, self.units[piece], self.parts)
        return {**counts, "rows": rows}


class _Write(_Work):
    folder = "shards"

    def __init__(self, plan: Plan, ordinals: Sequence[int], shards_: int) -> None:
        super().__init__(plan)
        self.ordinals, self.shards = list(ordinals), shards_

    def __call__(self, piece: int) -> dict[str, Any]:
        return shards.write_shard(self.plan, self.ordinals, piece, self.shards)
