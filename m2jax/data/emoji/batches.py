# SPDX-License-Identifier: Apache-2.0
"""Training batches of the emoji set: distinct concepts, each in one or several styles.

All drawings and all texts are decoded, scaled and tokenised once; a batch is a few gathers, so the
cores stay free for the training step. A batch never holds one concept twice, hence no pair in it is
a false negative.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8

from m2jax.config import Data, Experiment, UserError
from m2jax.data.emoji.dataset import EmojiData, default_directory, load
from m2jax.data.image import Preprocess
from m2jax.data.text import SentencePieceTokenizer, Tokenizer, Tokens, tokenizer_from_dict


class EmojiBatches:
    """Batch ``index`` of a run, from the seed and the index alone.

    Args:
        data: the data set.
        cfg: batch size, views, languages, keywords, held-out styles.
        tokenizer: turns names and keywords into ids.
        size: side of the images, pixels.
        seed: of the run.
    """

    def __init__(
        self,
        data: EmojiData,
        cfg: Data,
        tokenizer: Tokenizer,
        *,
        size: int,
        seed: int,
    ) -> None:
        self._cfg, self._seed = cfg, seed
        drawings = data.drawings("train", hold_out_styles=cfg.hold_out_styles)
        drawings = drawings.where(np.argsort(drawings.concept, kind="stable"))
        self._images = shrink(drawings.images, size)
        self._concepts, self._first, self._count = np.unique(
            drawings.concept, return_index=True, return_counts=True
        )
        if cfg.batch_size > len(self._concepts):
            raise UserError(
                f"data.batch_size={cfg.batch_size}: more than the {len(self._concepts)} concepts "
                "of the emoji set, and a batch holds each once: lower it"
            )
        self._texts = [
            TextTable.of([_variants(data, int(i), lang) for i in self._concepts], tokenizer)
            for lang in cfg.languages
        ]
        preprocess = Preprocess(size, background="white")
        self.assets: dict[str, Any] = {
            "tokenizer": tokenizer.to_dict(),
            "preprocess": preprocess.to_dict(),
        }

    @classmethod
    def of(cls, experiment: Experiment, assets: Mapping[str, Any] | None = None) -> EmojiBatches:
        """The batches of an experiment; builds the data set if it is not there.

        Args:
            experiment: the run.
            assets: of the model that the run starts from: its tokenizer is kept.
        """
        data, tokenizer = opened(experiment, assets)
        size, seed = experiment.model.image_size, experiment.train.seed
        return cls(data, experiment.data, tokenizer, size=size, seed=seed)

    def batch(self, index: int, rows: slice) -> dict[str, np.ndarray]:
        """Rows of batch ``index``.

        Returns:
            image uint8 [n, views, size, size, 4], text int32 and text_mask bool [n, languages,
            length], concept int32 [n].
        """
        chosen = self._concept_rows(index)
        rng = np.random.default_rng((self._seed, 1, index))
        picture = self._first[chosen] + _pick(rng, self._count[chosen], self._cfg.views)
        variant = [table.pick(rng, chosen, self._cfg.keywords) for table in self._texts]
        chosen, picture = chosen[rows], picture[:, rows]
        texts = [
            table.at(chosen, which[rows]) for table, which in zip(self._texts, variant, strict=True)
        ]
        return {
            "image": self._images[picture].swapaxes(0, 1),
            "text": np.stack([t.ids for t in texts], axis=1),
            "text_mask": np.stack([t.mask for t in texts], axis=1),
            "concept": self._concepts[chosen],
        }

    def _concept_rows(self, index: int) -> np.ndarray:
        """``batch_size`` distinct rows of the concept table: epochs are permutations, cut short."""
        per_epoch = len(self._concepts) // self._cfg.batch_size
        epoch, place = divmod(index, per_epoch)
        order = np.random.default_rng((self._seed, 0, epoch)).permutation(len(self._concepts))
        return order[place * self._cfg.batch_size :][: self._cfg.batch_size]


def opened(experiment: Experiment, assets: Mapping[str, Any] | None) -> tuple[EmojiData, Tokenizer]:
    """The data set of an experiment, built if it is not there, and the tokenizer of its run.

    Raises:
        UserError: the set's own tokenizer has more pieces than the model.
    """
    model = experiment.model
    data = load(default_directory(experiment.data.dir))
    if assets is not None:
        return data, tokenizer_from_dict(assets["tokenizer"])
    tokenizer = SentencePieceTokenizer(data.tokenizer_model, model.max_text_len)
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"model.vocab_size={model.vocab_size}: the emoji tokenizer has "
            f"{tokenizer.vocab_size} pieces: raise it"
        )
    return data, tokenizer


class TextTable:
    """Every way to name every concept in one language, tokenised.

    Row c has ``counts[c]`` variants: the name first, then keywords.
    """

    def __init__(self, tokens: Tokens, first: np.ndarray, counts: np.ndarray) -> None:
        self._tokens, self._first, self._counts = tokens, first, counts

    @classmethod
    def of(cls, variants: list[list[str]], tokenizer: Tokenizer) -> TextTable:
        """Tokenises the variants of each concept."""
        counts = np.array([len(v) for v in variants])
        tokens = tokenizer([text for v in variants for text in v])
        return cls(tokens, np.cumsum(counts) - counts, counts)

    def pick(self, rng: np.random.Generator, rows: np.ndarray, keywords: float) -> np.ndarray:
        """A variant per row: the name, or with probability ``keywords`` one with a keyword."""
        others = self._counts[rows] - 1
        other = 1 + np.floor(rng.random(len(rows)) * others).astype(np.int64)
        use = (rng.random(len(rows)) < keywords) & (others > 0)
        return np.where(use, other, 0)

    def at(self, rows: np.ndarray, variant: np.ndarray) -> Tokens:
        """The tokens of one variant per row."""
        index = self._first[rows] + variant
        return Tokens(self._tokens.ids[index], self._tokens.mask[index])


def shrink(images: UInt8[np.ndarray, "n h w 4"], size: int) -> UInt8[np.ndarray, "n s s 4"]:
    """Scales straight-alpha images down by area means of premultiplied colour.

    Raises:
        UserError: the drawings' side is no multiple of ``size``.
    """
    n, side = images.shape[:2]
    if side == size:
        return images
    if side % size:
        raise UserError(
            f"model.image_size={size}: the emoji drawings have {side} pixels: use a divisor of that"
        )
    out = np.empty((n, size, size, 4), np.uint8)
    k = side // size
    for start in range(0, n, 512):  # bounds the float copies
        x = images[start : start + 512].astype(np.float32)
        alpha = x[..., 3:] / 255
        x[..., :3] *= alpha
        x = x.reshape(-1, size, k, size, k, 4).mean((2, 4))
        cover = np.maximum(x[..., 3:] / 255, 1e-6)
        x[..., :3] = np.where(x[..., 3:] > 0, x[..., :3] / cover, 0)
        out[start : start + 512] = np.clip(np.rint(x), 0, 255).astype(np.uint8)
    return out


def _pick(rng: np.random.Generator, count: np.ndarray, views: int) -> np.ndarray:
    """``views`` numbers below each count [views, n]; they differ where the count allows it."""
    keys = rng.random((len(count), int(count.max())))
    keys[np.arange(keys.shape[1]) >= count[:, None]] = np.inf
    order = np.argsort(keys, axis=1)
    columns = np.arange(views)[:, None] % count
    return order[np.arange(len(count)), columns]


def _variants(data: EmojiData, concept: int, language: str) -> list[str]:
    """The name, then each keyword alone and behind the name."""
    name = data.concepts[concept].names[language]
    keywords = data.concepts[concept].keywords[language]
    return [name, *keywords, *(f"{name}, {word}" for word in keywords)]
