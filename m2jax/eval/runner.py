# SPDX-License-Identifier: Apache-2.0
"""Suites by name, and ``metrics.json``."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from m2jax.bundle import Bundle, load, local_directory
from m2jax.captioner import Captioner, can_write, load_captioner
from m2jax.config import UserError
from m2jax.data import emoji as emoji_data
from m2jax.data.emoji import EmojiData
from m2jax.eval import baselines, figures, suites
from m2jax.eval import emoji as emoji_suite
from m2jax.eval import metrics as metrics_lib
from m2jax.eval import scenes as scenes_suite
from m2jax.eval.emoji import Encoder, Scored
from m2jax.eval.figures import Figure
from m2jax.eval.scenes import Writer
from m2jax.eval.suites import Request
from m2jax.eval.tables import table as table  # what a run prints

TEST_STYLES = ("fluent", "openmoji")


class Setting(NamedTuple):
    """What a suite is told besides the model."""

    data_dir: str
    languages: Sequence[str]
    batch: int
    hold_out: tuple[str, ...]  # training styles that count as validation
    writer: Writer | None  # of captions, where the model has a decoder


class Evaluation(NamedTuple):
    """A suite's figures, and the rankings they came from."""

    metrics: dict[str, float]
    scored: list[Scored]
    examples: Mapping[str, np.ndarray] = {}  # of figures, see ``figures.Figure``
    questions: str = ""  # equal for evaluations whose examples are the same questions


def emoji(model: Encoder, setting: Setting) -> Evaluation:
    """Both test styles, every name the style draws as a candidate."""
    data = emoji_data.load(emoji_data.default_directory(setting.data_dir))
    found: dict[str, Figure] = {}
    metrics: dict[str, float] = {}
    scored: list[Scored] = []
    for style in TEST_STYLES:
        drawings = data.drawings(style)
        rows = emoji_suite.score_style(
            model,
            data,
            drawings,
            np.unique(drawings.concept),
            name=style,
            languages=setting.languages,
            batch=setting.batch,
        )
        for row in rows:
            found |= emoji_suite.summarise(row)
        scored += rows
        metrics |= _baseline(data, style, drawings, data.training_styles())
    return Evaluation(metrics | figures.flat(found), scored, figures.examples(found))


def emoji_validation(model: Encoder, setting: Setting) -> Evaluation:
    """The validation slice alone, ranked over all seen names: what tuning may look at."""
    hold_out = setting.hold_out
    data = emoji_data.load(emoji_data.default_directory(setting.data_dir))
    drawings = data.drawings("validation", hold_out_styles=hold_out)
    candidates = np.array([c.id for c in data.concepts if c.seen])
    rows = emoji_suite.score_style(
        model,
        data,
        drawings,
        candidates,
        name="validation",
        languages=setting.languages,
        batch=setting.batch,
    )
    found = {k: v for row in rows for k, v in emoji_suite.summarise(row).items()}
    gallery = data.drawings("train", hold_out_styles=hold_out)
    metrics = figures.flat(found) | _baseline(data, "validation", drawings, gallery)
    return Evaluation(metrics, rows, figures.examples(found))


def emoji_scenes(model: Encoder, setting: Setting, *, concepts: int = 0) -> Evaluation:
    """Composed scenes in both test styles: retrieval, captions, pointing.

    With ``concepts`` of so many concepts alone, those that ``data.concepts`` trains on.
    """
    data = emoji_data.load(emoji_data.default_directory(setting.data_dir))
    metrics: dict[str, float] = {}
    for style in TEST_STYLES:
        metrics |= scenes_suite.score_style(
            model,
            scenes_suite.pictures(data, data.drawings(style), concepts=concepts),
            name=style,
            languages=setting.languages,
            batch=setting.batch,
            writer=setting.writer,
        )
    return Evaluation(metrics, [])


def _baseline(
    data: EmojiData, style: str, drawings: emoji_data.Drawings, gallery: emoji_data.Drawings
) -> dict[str, float]:
    """Pixel nearest neighbour and chance, on the drawings of seen concepts."""
    known = drawings.where(data.is_seen(drawings))
    shown = np.unique(gallery.concept)
    right = metrics_lib.answer_matrix(data.answers(known), shown)
    ranks = baselines.pixel_nn(known, gallery, shown, right)
    found = {}
    for k in (1, 5):
        share = metrics_lib.hits(ranks, k)
        key = f"baseline/pixel_nn/{style}/top{k}"
        found |= {key: share.value, f"{key}_low": share.low, f"{key}_high": share.high}
        names = len(np.unique(drawings.concept))
        found[f"baseline/chance/{style}/top{k}"] = baselines.chance(names, k)
    return found


Suite = Callable[[Encoder, Setting], Evaluation]
SUITES: dict[str, Suite] = {
    "emoji": emoji,
    "emoji-validation": emoji_validation,
    "emoji-scenes": emoji_scenes,
    "emoji-scenes-120": functools.partial(emoji_scenes, concepts=120),
}
VALIDATION = {"emoji": "emoji-validation"}  # what a run that ends in a suite scores on its way


def names() -> list[str]:
    """Every suite."""
    return sorted({*SUITES, *suites.SUITES})


def opened(
    path: str | os.PathLike[str], mesh: Mesh | None = None
) -> tuple[Bundle, Captioner | None]:
    """A model as suites take it, with what writes its captions where it has a decoder.

    Args:
        path: what ``m2jax.load`` takes.
        mesh: devices that share its parameters and the rows it encodes; one device if not given.

    Raises:
        UserError: see ``m2jax.load`` and ``load_captioner``.
    """
    directory = local_directory(path)  # a remote one is fetched once
    if not can_write(directory):
        return load(directory, mesh=mesh), None
    writer = load_captioner(directory, mesh=mesh)
    return writer.bundle, writer


def check(
    suite: str, languages: Sequence[str], request: Request | None, *, flag: str = "--suite"
) -> None:
    """Refuses what cannot be scored, before a model is loaded for it; ``flag`` asked for it.

    Raises:
        UserError: an unknown suite or language, no data set where the suite needs one, or one that
            would give figures that say nothing.
    """
    if suite not in names():
        raise UserError(f"{flag} {suite}: no such suite: use one of {', '.join(names())}")
    unknown = set(languages) - {"en", "zh"}
    if unknown:
        raise UserError(f"--languages {sorted(unknown)[0]}: the suite has en and zh")
    if suite in suites.SUITES and request is None:
        raise UserError(
            f"{flag} {suite}: scores a data set: name it to `m2jax eval` with --data [READER:]PATH"
        )
    if request is not None and suite in suites.SUITES:
        suites.check(suite, request)


def run_suite(
    model: Encoder,
    *,
    suite: str = "emoji",
    data_dir: str = "",
    languages: Sequence[str] = ("en", "zh"),
    batch_size: int = 256,
    hold_out_styles: tuple[str, ...] = (),
    writer: Writer | None = None,
    request: Request | None = None,
) -> Evaluation:
    """Runs a suite.

    Args:
        model: what is scored.
        suite: one of ``names()``.
        data_dir: of the emoji suites.
        languages: of the emoji suites.
        batch_size: of the emoji suites.
        hold_out_styles: of the emoji validation.
        writer: asked for captions where a suite scores them.
        request: of the suites over data sets.

    Raises:
        UserError: an unknown suite or language, or data that cannot be had.
    """
    check(suite, languages, request)
    if suite in SUITES:
        setting = Setting(data_dir, languages, batch_size, hold_out_styles, writer)
        return SUITES[suite](model, setting)
    assert request is not None  # check saw to it
    found, questions = suites.score(model, suite, request)
    return Evaluation(figures.flat(found), [], figures.examples(found), questions)


def write_metrics(path: Path, metrics: dict[str, float]) -> None:
    """Writes ``metrics.json`` whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(metrics, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(temporary, path)
