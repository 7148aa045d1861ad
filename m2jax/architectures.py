# SPDX-License-Identifier: Apache-2.0
"""The named sizes of M2-Encoder: the three published ones and the demo's."""

from __future__ import annotations

import types
from collections.abc import Mapping


def _m2(width: int, heads: int, layers: int, out: int) -> dict[str, int]:
    """Sizes of one published M2-Encoder (spec section 1)."""
    return {
        "width": width,
        "heads": heads,
        "backbone_layers": layers,
        "vl_layers": 3,
        "out_dim": out,
        "image_size": 224,
        "patch_size": 16,
        "vocab_size": 115_244,
        "max_text_len": 52,
    }


ARCHITECTURES: Mapping[str, Mapping[str, int]] = types.MappingProxyType(
    {
        "m2-encoder-0.4b": _m2(768, 12, 9, 768),
        "m2-encoder-1b": _m2(1024, 16, 21, 1024),
        "m2-encoder-10b": _m2(4096, 32, 21, 1024),
        "m2-encoder-demo": {
            "width": 192,
            "heads": 3,
            "backbone_layers": 2,
            "vl_layers": 1,
            "out_dim": 128,
            "image_size": 32,
            "patch_size": 8,
            "vocab_size": 4000,
            "max_text_len": 12,
        },
    }
)

SIZES = tuple(ARCHITECTURES["m2-encoder-demo"])  # what must agree for parameters to fit

# A config from outside must not ask for endless work.
MOST_LAYERS, MOST_PIXELS, MOST = 512, 2**13, 2**24
LIMITS: Mapping[str, int] = types.MappingProxyType(
    dict.fromkeys((*SIZES, "text_positions"), MOST)
    | {"backbone_layers": MOST_LAYERS, "vl_layers": MOST_LAYERS, "image_size": MOST_PIXELS}
)
