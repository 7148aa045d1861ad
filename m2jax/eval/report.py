# SPDX-License-Identifier: Apache-2.0
"""``report.html``: one self-contained page a person can look at after a run."""

from __future__ import annotations

import html
import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from m2jax.data.emoji import default_directory
from m2jax.data.emoji import load as load_emoji
from m2jax.eval import report_rankings as rankings
from m2jax.eval.emoji import Scored
from m2jax.obs.metrics import read_rows

LIBRARIES = ("m2jax", "jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
CURVES = ("loss", "samples_per_s", "learning_rate", "scale")

STYLE = """
:root{color-scheme:light dark;--line:#8886;--good:#2a9d5c;--bad:#c8553d;--soft:#8881}
body{font:15px/1.5 system-ui,sans-serif;max-width:66rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2.2rem}
table{border-collapse:collapse}td,th{padding:.25rem .7rem;border-bottom:1px solid var(--line)}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(19rem,1fr));gap:.8rem}
.card{display:flex;gap:.8rem;background:var(--soft);border-radius:.5rem;padding:.6rem}
.card img{width:64px;height:64px;background:#fff;border-radius:.3rem;flex:none}
.card ol{margin:0;padding-left:1.2rem}.strip{display:flex;gap:.3rem;align-items:center}
.strip img{width:44px;height:44px;background:#fff;border-radius:.3rem;border:2px solid #0000}
.strip img.right{border-color:var(--good)}.right{color:var(--good);font-weight:600}
.curves{display:grid;grid-template-columns:repeat(auto-fill,minmax(15rem,1fr));gap:1rem}
svg{width:100%;height:auto}pre{background:var(--soft);padding:.8rem;overflow:auto}
"""


def write_report(
    workdir: Path, metrics: Mapping[str, float], scored: Sequence[Scored], data_dir: str = ""
) -> None:
    """Writes the page of a run from its figures, its rows and its rankings; whole or not at all."""
    data = load_emoji(default_directory(data_dir))
    rows = read_rows(workdir / "metrics.jsonl")
    sections = [
        "<h1>m2jax: what this run learned</h1>",
        _headline(metrics) if scored else _figures(metrics),
        "<h2>Curves</h2>" + _curves(rows),
    ]
    if scored:
        sections.append(rankings.groups(scored, data))
    for row in scored:
        sections.append(rankings.examples(row, data))
    for row in scored[:2]:  # one style, in each language
        sections.append(rankings.searches(row, data))
    for row in scored[:1]:
        sections += [rankings.mistakes(row, data), rankings.neighbours(row, data)]
    config = html.escape((workdir / "config.json").read_text(encoding="utf-8"))
    sections.append(f"<h2>Drawings and names</h2><pre>{html.escape(data.attribution)}</pre>")
    sections.append(f"<h2>Versions</h2><p>{html.escape(versions())}</p>")
    sections.append(f"<h2>Config</h2><details><summary>show</summary><pre>{config}</pre></details>")
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8><title>m2jax report</title>"
        f"<meta name=viewport content='width=device-width'><style>{STYLE}</style>"
        + "".join(sections)
    )
    temporary = workdir / "report.html.tmp"
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, workdir / "report.html")


def versions() -> str:
    """What the run was made with, on one line."""
    found = [f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES]
    machine = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    return ", ".join([*found, machine, f"{os.cpu_count()} cores"])


def _figures(metrics: Mapping[str, float]) -> str:
    """Every figure of a suite that ranks no drawings, as it is called in ``metrics.json``."""
    rows = "".join(
        f"<tr><td>{html.escape(key)}<td class=n>{value:.4g}"
        for key, value in sorted(metrics.items())
    )
    return f"<table><tr><th>what<th class=n>value{rows}</table>"


def _headline(metrics: Mapping[str, float]) -> str:
    """Zero-shot top-1 and top-5 with intervals, pixel neighbour and chance in the same table."""
    cells = []
    for key in sorted(metrics, key=lambda k: (k.startswith("baseline"), k)):
        if not key.endswith("/top1"):
            continue
        stem = key.removesuffix("/top1")
        name = " ".join(stem.split("/")[1:]).replace("_", " ")
        low, high = metrics.get(f"{key}_low"), metrics.get(f"{key}_high")
        span = "" if low is None or high is None else f"{100 * low:.1f} to {100 * high:.1f}"
        cells.append(
            f"<tr><td>{html.escape(name)}<td class=n>{100 * metrics[key]:.1f}<td class=n>{span}"
            f"<td class=n>{100 * metrics[f'{stem}/top5']:.1f}"
        )
    return (
        "<p>Share of drawings, in per cent, whose name ranks first (or among five) among all names "
        "the style draws. The styles were never trained on. Intervals are Wilson's, 95 %.</p>"
        "<table><tr><th>what<th class=n>top-1<th class=n>95 %<th class=n>top-5"
        f"{''.join(cells)}</table>"
    )


def _curves(rows: Sequence[Mapping[str, float]]) -> str:
    """One small line chart per logged quantity."""
    charts = []
    for name in CURVES:
        points = [(row["step"], row[name]) for row in rows if np.isfinite(row.get(name, np.nan))]
        if len(points) > 1:
            charts.append(
                f"<figure><figcaption>{html.escape(name)}</figcaption>{_line(points)}</figure>"
            )
    return f"<div class=curves>{''.join(charts)}</div>"


def _line(points: Sequence[tuple[float, float]]) -> str:
    """An SVG polyline with its first and last values written out."""
    x, y = np.array(points, np.float64).T
    across = (x - x[0]) / max(x[-1] - x[0], 1) * 300
    up = 100 - (y - y.min()) / max(np.ptp(y), 1e-12) * 90
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(across, up, strict=True))
    return (
        "<svg viewBox='0 0 300 120' role=img><polyline fill=none stroke=currentColor "
        f"stroke-width=1.5 points='{path}'/><text x=0 y=118 font-size=11 fill=currentColor>"
        f"step {x[0]:.0f}: {y[0]:.4g}</text><text x=300 y=118 font-size=11 fill=currentColor "
        f"text-anchor=end>step {x[-1]:.0f}: {y[-1]:.4g}</text></svg>"
    )
