# SPDX-License-Identifier: Apache-2.0
"""Suites by name, the table people read, and ``metrics.json``."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from m2jax.bundle import Bundle, load
from m2jax.captioner import can_write, load_captioner
from m2jax.config import UserError
from m2jax.data import emoji as emoji_data
from m2jax.data.emoji import EmojiData
from m2jax.eval import baselines
from m2jax.eval import emoji as emoji_suite
from m2jax.eval import metrics as metrics_lib
from m2jax.eval import scenes as scenes_suite
from m2jax.eval.emoji import Encoder, Scored
from m2jax.eval.scenes import Writer

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


def emoji(model: Encoder, setting: Setting) -> Evaluation:
    """Both test styles, every name the style draws as a candidate."""
    data = emoji_data.load(emoji_data.default_directory(setting.data_dir))
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
            metrics |= emoji_suite.summarise(row)
        scored += rows
        metrics |= _baseline(data, style, drawings, data.training_styles())
    return Evaluation(metrics, scored)


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
    metrics = {k: v for row in rows for k, v in emoji_suite.summarise(row).items()}
    gallery = data.drawings("train", hold_out_styles=hold_out)
    return Evaluation(metrics | _baseline(data, "validation", drawings, gallery), rows)


def emoji_scenes(model: Encoder, setting: Setting) -> Evaluation:
    """Composed scenes in both test styles: retrieval, captions, pointing."""
    data = emoji_data.load(emoji_data.default_directory(setting.data_dir))
    metrics: dict[str, float] = {}
    for style in TEST_STYLES:
        metrics |= scenes_suite.score_style(
            model,
            scenes_suite.pictures(data, data.drawings(style)),
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
}
VALIDATION = {"emoji": "emoji-validation"}  # what a run that ends in a suite scores on its way


def opened(path: str | os.PathLike[str]) -> tuple[Bundle, Writer | None]:
    """A model as suites take it, with what writes its captions where it has a decoder.

    Raises:
        UserError: see ``m2jax.load`` and ``load_captioner``.
    """
    if not can_write(path):
        return load(path), None
    writer = load_captioner(path)
    return writer.bundle, writer


def run_suite(
    model: Encoder,
    *,
    suite: str = "emoji",
    data_dir: str = "",
    languages: Sequence[str] = ("en", "zh"),
    batch_size: int = 256,
    hold_out_styles: tuple[str, ...] = (),
    writer: Writer | None = None,
) -> Evaluation:
    """Runs a suite; ``writer`` is asked for captions where a suite scores them.

    Raises:
        UserError: an unknown suite or language, or data that cannot be had.
    """
    if suite not in SUITES:
        raise UserError(f"--suite {suite}: no such suite: use one of {', '.join(sorted(SUITES))}")
    unknown = set(languages) - {"en", "zh"}
    if unknown:
        raise UserError(f"--languages {sorted(unknown)[0]}: the suite has en and zh")
    setting = Setting(data_dir, languages, batch_size, hold_out_styles, writer)
    return SUITES[suite](model, setting)


def evaluate(
    model: Encoder,
    *,
    suite: str = "emoji",
    data_dir: str = "",
    languages: Sequence[str] = ("en", "zh"),
    hold_out_styles: tuple[str, ...] = (),
    writer: Writer | None = None,
) -> dict[str, float]:
    """Runs a suite, prints its table, returns its flat metrics; see ``run_suite``."""
    evaluation = run_suite(
        model,
        suite=suite,
        data_dir=data_dir,
        languages=languages,
        hold_out_styles=hold_out_styles,
        writer=writer,
    )
    print(table(evaluation.metrics))
    return evaluation.metrics


def table(metrics: dict[str, float]) -> str:
    """What was scored, for people, baselines beside it; in per cent (95 % interval)."""
    parts = []
    if any(key.endswith("/top1") for key in metrics):
        parts.append(_zero_shot_table(metrics))
    if any(key.startswith("scenes/") for key in metrics):
        parts.append(_scenes_table(metrics))
    return "\n".join(parts)


def _zero_shot_table(metrics: dict[str, float]) -> str:
    """Zero-shot and retrieval."""
    lines = [f"{'':24}{'top-1':>20}{'top-5':>20}{'mean recall':>20}{'by chance':>11}"]
    for key in sorted(metrics):
        if not key.endswith("/top1"):
            continue
        stem = key.removesuffix("/top1")
        name = stem.removeprefix("zero_shot/").removeprefix("baseline/")
        recall = stem.replace("zero_shot", "retrieval") + "/mean_recall"
        chance = f"baseline/chance/{name.rpartition('/')[0]}/mean_recall"
        cells = [_cell(metrics, each) for each in (key, f"{stem}/top5", recall)]
        by_chance = (
            f"{100 * metrics[chance]:.1f}" if recall in metrics and chance in metrics else ""
        )
        lines.append(f"{name:24}" + "".join(f"{c:>20}" for c in cells) + f"{by_chance:>11}")
    return "\n".join(line.rstrip() for line in lines)


SCENE_COLUMNS = ("i2t_r1", "t2i_r1", "mean_recall", "pointing", "cider", "bleu4", "rouge_l")


def _scenes_table(metrics: dict[str, float]) -> str:
    """Scenes, one row per style and language; CIDEr, too, times a hundred."""
    lines = [f"{'':16}" + "".join(f"{name:>21}" for name in SCENE_COLUMNS)]
    for stem in sorted({k.rpartition("/")[0] for k in metrics if k.startswith("scenes/")}):
        cells = [_cell(metrics, f"{stem}/{name}") for name in SCENE_COLUMNS]
        lines.append(f"{stem.removeprefix('scenes/'):16}" + "".join(f"{c:>21}" for c in cells))
    for kind, said in (("chance", "by chance"), ("any_drawing", "pointing at any drawing")):
        stem = f"baseline/{kind}/scenes/"
        for key in sorted(k for k in metrics if k.startswith(stem)):
            lines.append(f"{said}: {key.removeprefix(stem)} {_cell(metrics, key)}")
    return "\n".join(line.rstrip() for line in lines)


def _cell(metrics: dict[str, float], key: str) -> str:
    """A share with its interval, in per cent; nothing where it was not measured."""
    if key not in metrics:
        return ""
    low, high = metrics.get(f"{key}_low"), metrics.get(f"{key}_high")
    span = "" if low is None or high is None else f" ({100 * low:.1f} - {100 * high:.1f})"
    return f"{100 * metrics[key]:.1f}{span}"


def write_metrics(path: Path, metrics: dict[str, float]) -> None:
    """Writes ``metrics.json`` whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(metrics, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(temporary, path)
