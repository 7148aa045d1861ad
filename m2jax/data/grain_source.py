# SPDX-License-Identifier: Apache-2.0
"""Any of our pair sources as a data source for a Grain pipeline of one's own."""

from __future__ import annotations

from typing import SupportsIndex

import numpy as np
from jaxtyping import UInt8

from m2jax.data.pairs import Pairs

Example = dict[str, UInt8[np.ndarray, "height width 3"] | dict[str, tuple[str, ...]]]


class GrainPairs:
    """Pairs (``TarPairs``, ``ShardPairs``, ``TfdsPairs``, ``TsvPairs``) by Grain's protocol.

    ``grain.MapDataset.source(GrainPairs(ShardPairs([folder]))).shuffle(seed=0).map(...)``; it can
    be sent to worker processes.
    """

    def __init__(self, pairs: Pairs) -> None:
        self._pairs = pairs

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, record_key: SupportsIndex) -> Example:
        """``image`` uint8 RGB, and ``texts`` by language.

        Raises:
            UserError: the row cannot be read.
        """
        image, texts = self._pairs.read(int(record_key))
        several = {k: v if isinstance(v, tuple) else (v,) for k, v in texts.items()}
        return {"image": np.asarray(image.convert("RGB")), "texts": several}

    def __repr__(self) -> str:
        return f"GrainPairs({type(self._pairs).__name__}, {len(self)} rows)"
