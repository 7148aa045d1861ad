# SPDX-License-Identifier: Apache-2.0
"""Observations as a page with their images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from m2jax.eval.sets.records import Images
from m2jax.tasks import page
from m2jax.tasks.longtail.table import Row


def of(content: Mapping[str, Any], pictures: Images, rows: Sequence[Row]) -> str:
    """The page of ``recipe.as_json``; the image an observation's class came from stands out."""
    place = {str(row.file): number for number, row in enumerate(rows)}

    def cards() -> Iterator[page.Card]:
        for observation in content["observations"]:
            for image in observation["images"]:
                row = rows[place[image["image"]]]
                where = image["place"] or f"{row.side['code'] or 'no place'}, unknown"
                agrees = image["class"] == observation["class"]
                lines = [
                    page.Line(f"observation {observation['observation']}", observation["class"]),
                    page.Line(image["class"], f"{image['score']:.3f}", agrees),
                    page.Line(where),
                ]
                yield page.Card(pictures.read(place[image["image"]]), image["image"], lines)

    about = "Green: the image agrees with the class of its observation."
    return page.page("m2jax longtail", about, cards())
