# SPDX-License-Identifier: Apache-2.0
"""Icons to pixels."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import resvg_py
from jaxtyping import UInt8
from PIL import Image

SIDE = 64  # pixels


def render(icons: Mapping[str, Any], name: str) -> UInt8[np.ndarray, "64 64 4"]:
    """Rasterises one icon of an Iconify collection as straight-alpha RGBA.

    Raises:
        ValueError: the drawing is no valid SVG.
    """
    icon = icons["icons"][name]
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    left, top = icon.get("left", 0), icon.get("top", 0)
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">'
        f"{icon['body']}</svg>"
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE, skip_system_fonts=True)
    image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    if image.size != (SIDE, SIDE):  # a drawing that is not square is centred
        canvas = Image.new("RGBA", (SIDE, SIDE))
        image.thumbnail((SIDE, SIDE))
        canvas.paste(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2))
        image = canvas
    return np.asarray(image)
