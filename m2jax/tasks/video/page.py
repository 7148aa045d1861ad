# SPDX-License-Identifier: Apache-2.0
"""The page of a search: one self-contained file, matched frames side by side on a timeline."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from m2jax.config import UserError
from m2jax.tasks.video import decode
from m2jax.tasks.video.search import Match

PAIRS = 6  # frames shown of a match
MOST = 40  # matches shown with frames
WIDE, HIGH = 168, 126  # pixels of a frame
COLOURS = ("#2a78b5", "#c8553d", "#2a9d5c", "#8a5fbf", "#b58a2a", "#3d8f95")

Grab = Callable[[Path, float, Sequence[int]], Mapping[int, Image.Image]]

STYLE = """
:root{color-scheme:light dark;--line:#8886;--soft:#8881}
body{font:15px/1.5 system-ui,sans-serif;max-width:76rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.4rem;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2.5rem 0 .4rem;overflow-wrap:anywhere}
h3{font-size:1rem;font-weight:600;margin:1.4rem 0 .4rem}
h3 b{display:inline-block;width:.8rem;height:.8rem;border-radius:.2rem;margin-right:.5rem}
p{margin:.3rem 0}.pairs{display:flex;gap:.5rem;overflow-x:auto}
figure{margin:0;font-size:.75rem;font-variant-numeric:tabular-nums}
.side{flex:none;width:5.5rem;display:grid;grid-template-rows:126px 126px;gap:1.5rem;
align-items:center;font-size:.85rem;opacity:.75}
figure img,.none{display:block;width:168px;height:126px;object-fit:contain;background:#0003;
border-radius:.3rem;margin-bottom:.2rem}
svg{width:100%;height:auto;background:var(--soft);border-radius:.4rem}
svg text{font:11px system-ui,sans-serif;fill:currentColor}
"""


def render(
    document: Mapping[str, Any],
    query: Path,
    references: Mapping[str, tuple[Path, float]],
    grab: Grab = decode.frames_at,
) -> str:
    """The page.

    Args:
        document: of ``search.document``.
        query: the query's file.
        references: of each matched video its file and its seconds. A file that is no longer there
            leaves its frames empty.
        grab: gives some frames of a video.
    """
    matches = [Match(**match) for match in document["matches"]]
    rate, seconds = float(document["rate"]), float(document["seconds"])
    names = list(dict.fromkeys(match.video for match in matches))
    shown = matches[:MOST]
    mine = _pictures(query, rate, [_numbers(m.query_start, m.query_end, rate) for m in shown], grab)
    theirs = {
        name: _pictures(
            references[name][0],
            rate,
            [_numbers(m.reference_start, m.reference_end, rate) for m in shown if m.video == name],
            grab,
        )
        for name in dict.fromkeys(m.video for m in shown)
    }
    title = html.escape(str(document["query"]))
    parts = [
        f"<h1>{title}</h1><p>{seconds:.1f} s, looked at {rate:g} times a second, "
        f"{html.escape(str(document['model']))}, {html.escape(str(document['method']))}: "
        f"{len(matches)} segments of {len(names)} videos"
        f"{f', frames of the first {MOST}' if len(matches) > MOST else ''}.</p>",
    ]
    for name in names:
        own = [m for m in matches if m.video == name]
        parts.append(f"<h2>{html.escape(name)}</h2>{_timeline(own, seconds, references[name][1])}")
        for number, match in enumerate(own):
            parts.append(_match(match, number))
            if match in shown:
                parts.append(_frames(match, rate, mine, theirs[name]))
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}: copies</title>"
        f"<meta name=viewport content='width=device-width'><style>{STYLE}</style>"
        + "".join(parts)
        + ("" if matches else "<p>No copied segment was found.</p>")
        + "\n"
    )


def _numbers(start: float, end: float, rate: float) -> list[int]:
    """Frames spread over a segment."""
    first, last = round(start * rate), max(round(end * rate) - 1, round(start * rate))
    count = min(PAIRS, last - first + 1)
    step = (last - first) / max(count - 1, 1)
    return [round(first + step * place) for place in range(count)]


def _pictures(
    path: Path, rate: float, wanted: Sequence[Sequence[int]], grab: Grab
) -> dict[int, str]:
    """Frames as data addresses; none where the file cannot be read any more."""
    try:
        found = grab(path, rate, sorted({number for numbers in wanted for number in numbers}))
    except UserError:
        return {}
    return {number: _data(image) for number, image in found.items()}


def _data(image: Image.Image) -> str:
    small = image.convert("RGB")
    small.thumbnail((WIDE, HIGH))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def _match(match: Match, number: int) -> str:
    colour = COLOURS[number % len(COLOURS)]
    return (
        f"<h3><b style='background:{colour}'></b>query {_clock(match.query_start)} to "
        f"{_clock(match.query_end)}, reference {_clock(match.reference_start)} to "
        f"{_clock(match.reference_end)}, similarity {match.score:.2f}</h3>"
    )


def _frames(match: Match, rate: float, mine: Mapping[int, str], theirs: Mapping[int, str]) -> str:
    """Frames of the query above the frames of the reference at the same part of the segment."""
    above = _numbers(match.query_start, match.query_end, rate)
    below = _numbers(match.reference_start, match.reference_end, rate)
    cells = []
    for place, number in enumerate(above):
        other = below[min(place * len(below) // len(above), len(below) - 1)]
        cells.append(
            f"<figure>{_picture(mine, number)}{_clock(number / rate)}"
            f"{_picture(theirs, other)}{_clock(other / rate)}</figure>"
        )
    sides = "<div class=side><span>query</span><span>reference</span></div>"
    return f"<div class=pairs>{sides}{''.join(cells)}</div>"


def _picture(pictures: Mapping[int, str], number: int) -> str:
    if number not in pictures:
        return "<span class=none></span>"
    return f"<img alt='frame {number}' src='{pictures[number]}'>"


def _timeline(matches: Sequence[Match], query: float, reference: float) -> str:
    """Both videos as bars on one scale, each match as a band between them."""
    scale = 1000 / max(query, reference, 1e-9)
    bands = []
    for number, m in enumerate(matches):
        ends = m.query_start, m.query_end, m.reference_end, m.reference_start
        a, b, c, d = (10 + scale * x for x in ends)
        bands.append(
            f"<polygon points='{a:.1f},24 {b:.1f},24 {b:.1f},36 {c:.1f},84 {c:.1f},96 "
            f"{d:.1f},96 {d:.1f},84 {a:.1f},36' fill='{COLOURS[number % len(COLOURS)]}' "
            "fill-opacity='.55'/>"
        )
    bars = "".join(
        f"<rect x=10 y={y} width={scale * length:.1f} height=12 fill=currentColor opacity=.25 />"
        for y, length in ((24, query), (84, reference))
    )
    return (
        "<svg viewBox='0 0 1020 120' role=img aria-label='segments of both videos'>"
        f"{bars}{''.join(bands)}"
        f"<text x=10 y=17>query, {_clock(query)}</text>"
        f"<text x=10 y=112>reference, {_clock(reference)}</text></svg>"
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds * 10) / 10, 60)
    return f"{int(minutes)}:{rest:04.1f}"
