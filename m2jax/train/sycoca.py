# SPDX-License-Identifier: Apache-2.0
"""SyCoCa (arXiv 2401.02137): contrast, captioning and text-guided masked image modelling at once.

The text asks the image (IC: a caption is written from image patches) and the image asks the text
(TG-MIM: masked patches are painted from it), so both sides are aligned locally. Attentive masking
lets the patches that fit the text best take part in both. The paper's equations and code were not
to be had: depths, ratios, directions and weights are settings, and their defaults are ours. Without
TG-MIM and with all patches it is CoCa (arXiv 2205.01917), but for the text tower, which here looks
both ways and shares nothing but the token table with the decoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from m2jax.config import Experiment, UserError
from m2jax.data.pairs import ANY, caption_languages
from m2jax.losses import masked as masked_lib
from m2jax.losses.language import linear_cross_entropy
from m2jax.models import layers
from m2jax.models import params as params_lib
from m2jax.models.heads import Heads, PatchTokenHead
from m2jax.models.m2 import M2Encoder, unit
from m2jax.models.params import Abstract, Params
from m2jax.train.image_text import Forward, ImageTextTask
from m2jax.train.task import Batch, Metrics
from m2jax.train.visual_tokenizer import (
    TOKENIZER,
    abstract_tokenizer,
    fresh_tokenizer,
    visual_tokens,
)

HEADS = "heads"  # where the heads' parameters lie, beside the encoder's


class Pairs(NamedTuple):
    """One image and one text per row: what the heads see of them."""

    pixels: Float[Array, "pairs size size 3"]
    image: Float[Array, "pairs tokens width"]  # of the vl layers, [CLS] first
    text: Float[Array, "pairs length width"]
    text_feature: Float[Array, "pairs dim"]
    ids: Int[Array, "pairs length"]
    mask: Bool[Array, "pairs length"]
    language: Int[Array, " pairs"]


class SyCoCaTask:
    """``ImageTextTask`` and the heads that ``loss.caption`` and ``loss.masked_image`` switch on.

    Every text is paired with one view of its row: text j with view j modulo views.

    Raises:
        UserError: options that exclude each other.
    """

    def __init__(self, experiment: Experiment, mesh: Mesh | None = None):
        cfg = experiment.loss
        if experiment.model.patch_drop and cfg.masked_image.weight:
            raise UserError(
                f"model.patch_drop={experiment.model.patch_drop}: dropped patches cannot be "
                "painted: set it or loss.masked_image.weight to 0"
            )
        self.experiment = experiment
        self.itc = ImageTextTask(experiment, mesh)
        self.languages = caption_languages(experiment.data, experiment.loss.caption)
        if unknown := set(experiment.data.languages) - {*self.languages, ANY}:
            raise UserError(
                f"loss.caption.languages={self.languages}: lacks {min(unknown)!r} of "
                "data.languages: add it"
            )
        self.heads: Abstract = params_lib.abstract_of(self._make_heads)
        self.model: Abstract = params_lib.beside(self.itc.model, HEADS, self.heads)
        self.tokenizer: Abstract | None = None
        if cfg.masked_image.weight and cfg.masked_image.target == "tokens":
            self.tokenizer = abstract_tokenizer(experiment)
            self.model = params_lib.beside(self.model, TOKENIZER, self.tokenizer)

    def _make_heads(self, rngs: nnx.Rngs) -> Heads:
        cfg = self.experiment
        return Heads(rngs, cfg.model, cfg.loss, len(self.languages))

    def init(self, rng: jax.Array) -> Params:
        """Fresh parameters; the encoder's are those of a run without heads.

        The trainer puts a trained tokenizer in the place of a random one.
        """
        heads = params_lib.initialise_of(self._make_heads, jax.random.fold_in(rng, 1))
        params = {**self.itc.init(rng), HEADS: heads}
        if self.tokenizer is not None:
            params[TOKENIZER] = fresh_tokenizer(self.experiment, rng)
        return params

    def batch_spec(self, batch_size: int) -> Mapping[str, jax.ShapeDtypeStruct]:
        """As of ``ImageTextTask``; with the language of each text where its place does not tell."""
        spec, texts = dict(self.itc.batch_spec(batch_size)), self.experiment.data.languages
        if ANY in texts and self.experiment.loss.caption.weight:
            spec["language"] = jax.ShapeDtypeStruct((batch_size, len(texts)), jnp.int32)
        return spec

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Metrics]:
        """The weighted sum of the objectives, and each of them."""
        cfg = self.experiment.loss
        forward = self.itc.forward(params, batch, jax.random.fold_in(rng, 0))
        total, metrics = self.itc.contrast(params, forward.features, batch)
        metrics = dict(metrics)
        model, heads = self.itc.bind(params), params_lib.bind(self.heads.graph, params[HEADS])
        pairs = self._pairs(forward, batch)
        scores = self._relevance(model, pairs)
        if cfg.caption.weight:
            metrics["loss/caption"] = self._caption(
                model, heads, pairs, scores, jax.random.fold_in(rng, 1)
            )
            total = total + cfg.caption.weight * metrics["loss/caption"]
        if cfg.masked_image.weight:
            codes = None
            if self.tokenizer is not None:  # of the whole view, as the encoder gets it
                codes = visual_tokens(self.tokenizer, params, pairs.pixels)
            metrics["loss/masked_image"] = self._paint(
                model, heads, pairs, scores, codes, jax.random.fold_in(rng, 2)
            )
            total = total + cfg.masked_image.weight * metrics["loss/masked_image"]
        return total, metrics

    def after_update(self, params: Params) -> Params:
        """As of ``ImageTextTask``."""
        return self.itc.after_update(params)

    def frozen(self, name: str) -> bool:
        """As of ``ImageTextTask``, and the whole tokenizer."""
        return name.startswith(f"{TOKENIZER}.") or self.itc.frozen(name)

    def layer_scales(self, decay: float) -> Mapping[str, Any]:
        """As of ``ImageTextTask``; the heads, which lie above all layers, keep their rate."""
        names = params_lib.flatten(self.model.params)
        above = {n: 1.0 for n in names if n.startswith((f"{HEADS}.", f"{TOKENIZER}."))}
        return {**self.itc.layer_scales(decay), **above}

    def _pairs(self, forward: Forward, batch: Batch) -> Pairs:
        """What the heads see of each text and of the view it is paired with."""
        rows, views = batch["image"].shape[:2]
        languages = batch["text"].shape[1]
        view = jnp.arange(languages) % views

        if "language" in batch:
            language = batch["language"].reshape(-1)
        else:  # no tag is read where the place does not tell it
            told = self.experiment.data.languages
            known = [0 if name == ANY else self.languages.index(name) for name in told]
            language = jnp.tile(jnp.asarray(known), rows)

        def paired(x: jax.Array) -> jax.Array:
            by_view = x.reshape(rows, views, *x.shape[1:])
            return by_view[:, view].reshape(rows * languages, *x.shape[1:])

        return Pairs(
            pixels=paired(forward.pixels),
            image=paired(forward.image.vl.tokens),
            text=forward.text.vl.tokens,
            text_feature=forward.text.features,
            ids=batch["text"].reshape(rows * languages, -1),
            mask=batch["text_mask"].reshape(rows * languages, -1),
            language=language,
        )

    def _relevance(self, model: M2Encoder, pairs: Pairs) -> jax.Array:
        """Cosine of each patch, through the image head, with the text's feature."""
        patches = unit(model.image_vl_head(pairs.image[:, 1:]))
        return masked_lib.relevance(patches, pairs.text_feature)

    def _caption(
        self, model: M2Encoder, heads: Heads, pairs: Pairs, scores: jax.Array, rng: jax.Array
    ) -> jax.Array:
        """IC: -log p(word | words before it, chosen patches), the mean over words."""
        cfg, memory = self.experiment.loss.caption, pairs.image
        if cfg.patches != "all":
            kept = masked_lib.chosen(scores, cfg.ratio, cfg.patches, rng)
            patches = jnp.take_along_axis(memory[:, 1:], kept[..., None], axis=1)
            memory = jnp.concatenate([memory[:, :1], patches], axis=1)
        table, ids = model.text_embed[...], pairs.ids
        words = layers.lookup(table, ids[:, 1:-1], model.dtype)
        assert heads.caption is not None  # its weight made it
        states = heads.caption(words, pairs.language, memory)
        return linear_cross_entropy(
            states,
            table,
            ids[:, 1:],
            pairs.mask[:, 1:],
            vocab_size=self.experiment.model.vocab_size,
            positions=cfg.positions,
        )

    def _paint(
        self,
        model: M2Encoder,
        heads: Heads,
        pairs: Pairs,
        scores: jax.Array,
        codes: jax.Array | None,
        rng: jax.Array,
    ) -> jax.Array:
        """TG-MIM: the masked patches, from the rest and the text.

        Their squared error, or -log p(visual token) where ``codes`` holds those of all patches.
        """
        cfg = self.experiment.loss.masked_image
        pixels, patch = pairs.pixels, self.experiment.model.patch_size
        chosen = masked_lib.chosen(scores, cfg.ratio, cfg.patches, rng)
        masked = masked_lib.as_mask(chosen, scores.shape[1])
        tokens = model.encode_image(pixels, masked=masked, rng=rng).vl.tokens
        assert heads.masked_image is not None  # its weight made it
        painted = heads.masked_image(tokens, pairs.text, pairs.mask)
        if isinstance(heads.masked_image, PatchTokenHead):
            assert codes is not None  # the target made both
            states, told, weight = masked_lib.at_chosen(painted, codes, chosen)
            table = heads.masked_image.tokens.embed[...]
            return linear_cross_entropy(states, table, told, weight, positions=cfg.positions)
        return masked_lib.masked_pixel_loss(
            painted, masked_lib.patch_targets(pixels, patch), masked
        )
