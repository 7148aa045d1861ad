# SPDX-License-Identifier: Apache-2.0
"""Several short texts in one row of tokens, for models that read a text alone.

Captions are mostly shorter than the rows they are padded to, so a model on them computes much
padding. Grain's first-fit packing puts them together; segment ids say which tokens belong together,
and attention must not look across them. The contrastive trainer takes one caption per row and does
not use this: it is for a Grain pipeline of one's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import grain
import numpy as np
from grain.experimental import FirstFitPackIterDataset

from m2jax.config import UserError
from m2jax.data.text import Tokenizer


def packed(
    texts: grain.MapDataset | grain.IterDataset | Sequence[str],
    tokenizer: Tokenizer,
    *,
    length: int,
    bins: int = 64,
) -> grain.IterDataset:
    """Rows of ``length`` tokens, each with as many whole texts as fit.

    Args:
        texts: a data set of strings, or the strings.
        tokenizer: of the model; each text keeps its own first and last tokens.
        length: tokens of a row.
        bins: rows that are filled at once; more of them waste less and mix further.

    Returns:
        A data set of ``text`` int [length], ``text_positions`` int [length] (from 0 in each text)
        and ``text_segment_ids`` int [length] (from 1; 0 is padding). It can be saved and restored.

    Raises:
        UserError: a text may be longer than a row.
    """
    longest = tokenizer(["x"]).ids.shape[1]
    if longest > length:
        raise UserError(f"packing: texts of up to {longest} tokens into rows of {length}: raise it")
    data = grain.MapDataset.source(texts) if isinstance(texts, Sequence) else texts
    if isinstance(data, grain.MapDataset):
        data = data.to_iter_dataset()

    def tokens(text: str) -> dict[str, np.ndarray]:
        ids, mask = tokenizer([text])
        return {"text": ids[0][mask[0]]}

    rows = data.map(tokens)
    return FirstFitPackIterDataset(rows, length_struct={"text": length}, num_packing_bins=bins)
