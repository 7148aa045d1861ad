# SPDX-License-Identifier: Apache-2.0
"""A self-contained page of pictures with what was found in them."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from PIL import Image

SIDE = 160  # pixels of a picture's longer side on the page

STYLE = """
:root{color-scheme:light dark;--good:#2a9d5c;--soft:#8881}
body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(21rem,1fr));gap:.8rem}
.card{display:flex;gap:.8rem;background:var(--soft);border-radius:.5rem;padding:.6rem}
.card img{max-width:160px;max-height:160px;object-fit:contain;background:#fff;align-self:start}
.card p{margin:0;overflow-wrap:anywhere;font-size:.85em;opacity:.7}
ul{margin:.2rem 0;padding-left:1.1rem}.on{color:var(--good);font-weight:600}
small{opacity:.7}
"""


class Line(NamedTuple):
    """One thing said of a picture."""

    text: str
    note: str = ""
    on: bool = False  # it holds


class Card(NamedTuple):
    """A picture and what is said of it."""

    image: Image.Image
    name: str
    lines: Sequence[Line]


def page(title: str, about: str, cards: Iterable[Card]) -> str:
    """The page. Every text in it is escaped: file names and labels are not ours."""
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
        f"<meta name=viewport content='width=device-width'><style>{STYLE}</style>"
        f"<h1>{html.escape(title)}</h1><p>{html.escape(about)}</p><div class=cards>"
        f"{''.join(map(_card, cards))}</div></html>\n"
    )


def _card(card: Card) -> str:
    lines = "".join(
        f"<li{' class=on' if line.on else ''}>{html.escape(line.text)} "
        f"<small>{html.escape(line.note)}</small></li>"
        for line in card.lines
    )
    return (
        f"<div class=card><img alt='' src='{_inline(card.image)}'><div>"
        f"<p>{html.escape(card.name)}</p><ul>{lines}</ul></div></div>"
    )


def _inline(image: Image.Image) -> str:
    """A small PNG as a data address."""
    small = image.convert("RGBA" if image.has_transparency_data else "RGB")
    small.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    small.save(out, "PNG")
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"
