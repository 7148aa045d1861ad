# SPDX-License-Identifier: Apache-2.0
"""The parts of a report that show rankings: what the model saw, and what it took it for."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from m2jax.data.emoji import EmojiData
from m2jax.data.emoji.concepts import GROUPS
from m2jax.eval.emoji import Scored

EXAMPLES = 12  # shown per style, every n-th of the set: none is picked by its result
BEST = 5  # names or drawings shown of each ranking
WORST = 10  # mistakes and pairs shown


def groups(scored: Sequence[Scored], data: EmojiData) -> str:
    """Zero-shot top-1 of each group of concepts, a column per style and language."""
    members = [np.array([data.concepts[i].group for i in row.drawings.concept]) for row in scored]
    hits = [_first_is_right(row) for row in scored]
    lines = []
    for group in sorted(set(np.concatenate(members).tolist())):
        cells = [f"<td>{html.escape(GROUPS[group])}"]
        for member, hit in zip(members, hits, strict=True):
            part = hit[member == group]
            share = f"{100 * part.mean():.0f} <small>of {len(part)}</small>" if len(part) else ""
            cells.append(f"<td class=n>{share}")
        lines.append(f"<tr>{''.join(cells)}")
    heads = "".join(f"<th class=n>{html.escape(f'{r.style}, {r.language}')}" for r in scored)
    return (
        "<h2>By group: per cent whose right name ranks first</h2>"
        f"<table><tr><th>group{heads}{''.join(lines)}</table>"
    )


def examples(row: Scored, data: EmojiData) -> str:
    """Every n-th drawing with its best names, the right ones marked."""
    step = max(len(row.drawings) // EXAMPLES, 1)
    cards = []
    for index in range(0, len(row.drawings), step)[:EXAMPLES]:
        items = "".join(
            f"<li{' class=right' if row.right[index, j] else ''}>{_name(data, row, column=j)}"
            for j in np.argsort(-row.scores[index])[:BEST]
        )
        cards.append(f"<div class=card>{_picture(row, data, index)}<ol>{items}</ol></div>")
    title = f"{row.style}, {row.language}: one drawing in {step} and its {BEST} names"
    return _cards(title, cards)


def searches(row: Scored, data: EmojiData) -> str:
    """Every n-th name with its best drawings, the right ones framed."""
    step = max(len(row.candidates) // EXAMPLES, 1)
    cards = []
    for column in range(0, len(row.candidates), step)[:EXAMPLES]:
        pictures = "".join(
            _picture(row, data, i, right=bool(row.right[i, column]))
            for i in np.argsort(-row.scores[:, column])[:BEST]
        )
        cards.append(
            f"<div class=card><div>{_name(data, row, column=column)}"
            f"<div class=strip>{pictures}</div></div></div>"
        )
    title = f"{row.style}, {row.language}: one name in {step} and its {BEST} drawings"
    return _cards(title, cards)


def mistakes(row: Scored, data: EmojiData) -> str:
    """The wrong first names the model is surest of, beside the drawing's own."""
    first = np.argmax(row.scores, axis=1)
    wrong = ~_first_is_right(row)
    sure = np.where(wrong, row.scores.max(axis=1), -np.inf)
    cards = []
    for index in np.argsort(-sure)[: min(WORST, int(wrong.sum()))]:
        others = np.flatnonzero(row.drawings.concept == row.candidates[first[index]])
        other = _picture(row, data, int(others[0])) if len(others) else ""
        cards.append(
            f"<div class=card>{_picture(row, data, index)}<span>{_own_name(data, row, index)}"
            f"<br>taken for <b>{_name(data, row, column=first[index])}</b></span>{other}</div>"
        )
    return _cards(f"{row.style}, {row.language}: the surest mistakes", cards)


def neighbours(row: Scored, data: EmojiData) -> str:
    """The pairs of drawings that the model tells apart least: each likes the other's name.

    The score of a pair is how far the two foreign names lead over the two own names, summed.
    """
    column = {int(c): j for j, c in enumerate(row.candidates)}
    rows = np.array([i for i, c in enumerate(row.drawings.concept) if int(c) in column], np.int64)
    columns = np.array([column[int(row.drawings.concept[i])] for i in rows], np.int64)
    scores = row.scores[np.ix_(rows, columns)]
    same = row.right[np.ix_(rows, columns)]
    lead = scores - np.diagonal(scores)[:, None]
    pair = np.where(same | same.T, -np.inf, lead + lead.T)
    pair[np.tril_indices(len(pair))] = -np.inf
    cards = []
    for place in np.argsort(-pair, axis=None)[:WORST]:
        a, b = (int(rows[k]) for k in np.unravel_index(place, pair.shape))
        if not np.isfinite(pair.flat[place]):
            break
        names = f"{_own_name(data, row, a)}<br>{_own_name(data, row, b)}"
        cards.append(
            f"<div class=card>{_picture(row, data, a)}<span>{names}</span>"
            f"{_picture(row, data, b)}</div>"
        )
    return _cards(f"{row.style}, {row.language}: the pairs it tells apart least", cards)


def _first_is_right(row: Scored) -> np.ndarray:
    """Whether the best-scored candidate of each drawing is a right one."""
    return row.right[np.arange(len(row.scores)), np.argmax(row.scores, axis=1)]


def _name(data: EmojiData, row: Scored, *, column: int) -> str:
    """A candidate's name in the language of the row."""
    return html.escape(data.concepts[int(row.candidates[column])].names[row.language])


def _own_name(data: EmojiData, row: Scored, index: int) -> str:
    """The name of what a drawing shows."""
    return html.escape(data.concepts[int(row.drawings.concept[index])].names[row.language])


def _cards(title: str, cards: Sequence[str]) -> str:
    return f"<h2>{html.escape(title)}</h2><div class=cards>{''.join(cards)}</div>"


def _picture(row: Scored, data: EmojiData, index: int, *, right: bool = False) -> str:
    """An <img> that carries its own bytes."""
    out = io.BytesIO()
    Image.fromarray(row.drawings.images[index]).save(out, "PNG", optimize=True)
    code = base64.b64encode(out.getvalue()).decode()
    name = html.escape(
        data.concepts[int(row.drawings.concept[index])].names[row.language], quote=True
    )
    mark = " class=right" if right else ""
    return f"<img{mark} alt='{name}' title='{name}' src='data:image/png;base64,{code}'>"
