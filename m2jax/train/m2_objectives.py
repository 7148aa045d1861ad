# SPDX-License-Identifier: Apache-2.0
"""M2-Encoder's masked objectives (arXiv 2401.15896): CMLM and CMIM beside the contrast.

Both run image and text as one sequence through the encoder. CMLM hides whole words and tells them
from the image and the other words; CMIM hides patches and tells their visual tokens, which a frozen
tokenizer made of the whole image, from the text and the other patches. The release holds flags but
no code of either (spec section 12): that each has a pass of its own, that a hidden word always
becomes the mask token, and that hidden patches are random are our choices.
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
from m2jax.data.augment import augment
from m2jax.losses import masked as masked_lib
from m2jax.losses.language import linear_cross_entropy
from m2jax.models import params as params_lib
from m2jax.models.m2 import M2Encoder
from m2jax.models.m2_heads import M2Heads
from m2jax.models.params import Abstract, Params
from m2jax.train.image_text import ImageTextTask
from m2jax.train.sycoca import SyCoCaTask
from m2jax.train.task import Batch, Metrics
from m2jax.train.visual_tokenizer import (
    TOKENIZER,
    abstract_tokenizer,
    fresh_tokenizer,
    visual_tokens,
)

HEADS = "m2_heads"  # where the heads' parameters lie, beside the encoder's


class Pairs(NamedTuple):
    """One image and one text per row."""

    pixels: Float[Array, "pairs size size 3"]
    ids: Int[Array, "pairs length"]
    mask: Bool[Array, "pairs length"]


class M2Task:
    """The contrast, SyCoCa's heads where they are on, and what ``loss.masked_*`` switch on.

    Every text is paired with one view of its row: text j with view j modulo views.

    Raises:
        UserError: options that exclude each other.
    """

    def __init__(self, experiment: Experiment, mesh: Mesh | None = None):
        cfg = experiment.loss
        if experiment.model.patch_drop and cfg.masked_tokens.weight:
            raise UserError(
                f"model.patch_drop={experiment.model.patch_drop}: dropped patches have no visual "
                "token to tell: set it or loss.masked_tokens.weight to 0"
            )
        self.experiment = experiment
        sycoca = cfg.caption.weight or cfg.masked_image.weight
        self.base = SyCoCaTask(experiment, mesh) if sycoca else ImageTextTask(experiment, mesh)
        self.itc = self.base.itc if isinstance(self.base, SyCoCaTask) else self.base
        self.heads: Abstract = params_lib.abstract_of(self._make_heads)
        self.model: Abstract = params_lib.beside(self.base.model, HEADS, self.heads)
        self.tokenizer: Abstract | None = None
        if isinstance(self.base, SyCoCaTask):
            self.tokenizer = self.base.tokenizer  # one for both
        if cfg.masked_tokens.weight and self.tokenizer is None:
            self.tokenizer = abstract_tokenizer(experiment)
            self.model = params_lib.beside(self.model, TOKENIZER, self.tokenizer)

    def _make_heads(self, rngs: nnx.Rngs) -> M2Heads:
        return M2Heads(rngs, self.experiment.model, self.experiment.loss)

    def init(self, rng: jax.Array) -> Params:
        """Fresh parameters; the trainer puts a trained tokenizer in the place of the random one."""
        heads = params_lib.initialise_of(self._make_heads, jax.random.fold_in(rng, 2))
        params = {**self.base.init(rng), HEADS: heads}
        if self.tokenizer is not None and TOKENIZER not in params:
            params[TOKENIZER] = fresh_tokenizer(self.experiment, rng)
        return params

    def batch_spec(self, batch_size: int) -> Mapping[str, jax.ShapeDtypeStruct]:
        """As of ``ImageTextTask``, and for CMLM the word of every token (``data.words``)."""
        spec = dict(self.base.batch_spec(batch_size))
        if self.experiment.loss.masked_text.weight:
            spec["text_word"] = spec["text"]
        return spec

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Metrics]:
        """The weighted sum of the objectives, and each of them."""
        cfg = self.experiment.loss
        total, metrics = self.base.loss(params, batch, rng)
        metrics = dict(metrics)
        keys = jax.random.split(jax.random.fold_in(rng, 3), 3)
        model, heads = self.itc.bind(params), params_lib.bind(self.heads.graph, params[HEADS])
        pairs = self._pairs(batch, keys[0], model.dtype)
        if cfg.masked_text.weight:
            word = batch["text_word"].reshape(pairs.ids.shape)
            metrics["loss/masked_text"] = self._words(model, heads, pairs, word, keys[1])
            total = total + cfg.masked_text.weight * metrics["loss/masked_text"]
        if cfg.masked_tokens.weight:
            assert self.tokenizer is not None  # its weight made it
            codes = visual_tokens(self.tokenizer, params, pairs.pixels)
            metrics["loss/masked_tokens"] = self._tokens(model, heads, pairs, codes, keys[2])
            total = total + cfg.masked_tokens.weight * metrics["loss/masked_tokens"]
        return total, metrics

    def after_update(self, params: Params) -> Params:
        """As of ``ImageTextTask``."""
        return self.base.after_update(params)

    def frozen(self, name: str) -> bool:
        """As of ``ImageTextTask``, and the whole tokenizer."""
        return name.startswith(f"{TOKENIZER}.") or self.base.frozen(name)

    def layer_scales(self, decay: float) -> Mapping[str, Any]:
        """As of the tasks below; the heads, which lie above all layers, keep their rate."""
        names = params_lib.flatten(self.model.params)
        above = {n: 1.0 for n in names if n.startswith((f"{HEADS}.", f"{TOKENIZER}."))}
        return {**self.base.layer_scales(decay), **above}

    def _pairs(self, batch: Batch, rng: jax.Array, dtype: jnp.dtype) -> Pairs:
        """Each text and the view it is paired with, changed anew."""
        rows, views = batch["image"].shape[:2]
        languages = batch["text"].shape[1]
        view = jnp.arange(languages) % views
        pixels = augment(batch["image"], self.experiment.data.augment, rng, dtype)[:, view]
        return Pairs(
            pixels.reshape(rows * languages, *pixels.shape[2:]),
            batch["text"].reshape(rows * languages, -1),
            batch["text_mask"].reshape(rows * languages, -1),
        )

    def _words(
        self, model: M2Encoder, heads: M2Heads, pairs: Pairs, word: jax.Array, rng: jax.Array
    ) -> jax.Array:
        """CMLM: -log p(word | the words not hidden, the image), the mean over hidden tokens."""
        cfg, keys = self.experiment.loss, jax.random.split(rng)
        assert heads.masked_text is not None  # its weight made it
        hidden = masked_lib.chosen_words(word, cfg.masked_text.ratio, keys[0])
        stand_in = heads.masked_text.mask_token[...]
        text = model.embed_text(pairs.ids, masked=hidden, mask_token=stand_in)
        image = model.embed_image(pairs.pixels)
        joint = model.encode_joint(image, text, pairs.mask, vl=cfg.joint_vl, rng=keys[1])
        return linear_cross_entropy(
            heads.masked_text(joint.text),
            model.text_embed[...],
            pairs.ids,
            hidden,
            vocab_size=self.experiment.model.vocab_size,
            positions=cfg.masked_text.positions,
        )

    def _tokens(
        self, model: M2Encoder, heads: M2Heads, pairs: Pairs, codes: jax.Array, rng: jax.Array
    ) -> jax.Array:
        """CMIM: -log p(visual token | the patches not hidden, the text), over hidden patches."""
        cfg, keys = self.experiment.loss, jax.random.split(rng)
        assert heads.masked_tokens is not None  # its weight made it
        scores = jnp.zeros(codes.shape, jnp.float32)
        hidden = masked_lib.chosen(scores, cfg.masked_tokens.ratio, "random", keys[0])
        masked = masked_lib.as_mask(hidden, codes.shape[1])
        image = model.embed_image(pairs.pixels, masked=masked)
        text = model.embed_text(pairs.ids)
        joint = model.encode_joint(image, text, pairs.mask, vl=cfg.joint_vl, rng=keys[1])
        states, told, weight = masked_lib.at_chosen(joint.image[:, 1:], codes, hidden)
        return linear_cross_entropy(
            states,
            heads.masked_tokens.embed[...],
            told,
            weight,
            positions=cfg.masked_tokens.positions,
        )
