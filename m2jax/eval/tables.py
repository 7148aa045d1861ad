# SPDX-License-Identifier: Apache-2.0
"""What was scored, for people: on the terminal, and as markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple


def table(metrics: dict[str, float]) -> str:
    """What was scored, baselines beside it; in per cent (95 % interval)."""
    parts = []
    if any(_of_emoji(key) for key in metrics):
        parts.append(_zero_shot_table(metrics))
    if any(key.startswith("scenes/") for key in metrics):
        parts.append(_scenes_table(metrics))
    if not parts:
        parts = [_plain(block) for block in _blocks(metrics)]
    return "\n".join(parts)


def markdown(metrics: dict[str, float]) -> str:
    """The same figures as tables of markdown, one per protocol."""
    parts = []
    for columns, rows in _blocks(metrics):
        lines = ["| per cent (95 % interval) | " + " | ".join(columns) + " |"]
        lines.append("|---" * (len(columns) + 1) + "|")
        lines += ["| " + " | ".join([name, *cells]) + " |" for name, cells in rows]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


class Block(NamedTuple):
    """One table: figures of one protocol."""

    columns: list[str]
    rows: list[tuple[str, list[str]]]


def _blocks(metrics: Mapping[str, float]) -> Iterator[Block]:
    """Figures by protocol; a row for each stem of their names."""
    stems: dict[str, dict[str, list[str]]] = {}
    for key in metrics:
        if not key.endswith(("_low", "_high")):
            stem, _, figure = key.rpartition("/")
            stems.setdefault(stem.split("/")[0], {}).setdefault(stem, []).append(figure)
    for of_protocol in stems.values():
        columns = list(dict.fromkeys(f for figures in of_protocol.values() for f in figures))
        yield Block(
            columns,
            [
                (stem, [_cell(metrics, f"{stem}/{column}") for column in columns])
                for stem in of_protocol
            ],
        )


def _plain(block: Block) -> str:
    width = max(len(name) for name, _ in block.rows) + 1
    lines = [" " * width + "".join(f"{column:>21}" for column in block.columns)]
    lines += [f"{name:{width}}" + "".join(f"{c:>21}" for c in cells) for name, cells in block.rows]
    return "\n".join(line.rstrip() for line in lines)


def _of_emoji(key: str) -> bool:
    """Whether a figure is of the emoji suite, whose names have parts for seen and unseen."""
    return key.startswith("zero_shot/") and key.count("/") == 4


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
    baselines = {
        "chance": "by chance",
        "any_drawing": "pointing at any drawing",
        "another_caption": "another picture's caption",
    }
    for kind, said in baselines.items():
        stem = f"baseline/{kind}/scenes/"
        for key in sorted(k for k in metrics if k.startswith(stem)):
            if key.endswith(("_low", "_high")):
                continue
            lines.append(f"{said}: {key.removeprefix(stem)} {_cell(metrics, key)}")
    return "\n".join(line.rstrip() for line in lines)


def _cell(metrics: Mapping[str, float], key: str) -> str:
    """A share with its interval, in per cent; nothing where it was not measured."""
    if key not in metrics:
        return ""
    if key.startswith("data/"):  # about the data set, no share
        return f"{metrics[key]:.2f}"
    low, high = metrics.get(f"{key}_low"), metrics.get(f"{key}_high")
    span = "" if low is None or high is None else f" ({100 * low:.1f} - {100 * high:.1f})"
    return f"{100 * metrics[key]:.1f}{span}"
