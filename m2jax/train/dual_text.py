# SPDX-License-Identifier: Apache-2.0
"""The image-text contrast for imported dual encoders (CLIP, SigLIP, Chinese-CLIP): fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from m2jax.config import Experiment
from m2jax.config_dual import Dual
from m2jax.data.augment import augment
from m2jax.models import params as params_lib
from m2jax.models.depth import layer_scales
from m2jax.models.params import Params
from m2jax.train.image_text import Head, ImageTextTask, same_caption
from m2jax.train.task import Batch, Features, Metrics

HEADS = ("vision.head.", "text.head.")


class DualTextTask(ImageTextTask):
    """As ``ImageTextTask``, on the one pair of features that such a model has.

    A model with ``logit_bias`` is trained with the sigmoid loss, as SigLIP was, any other with
    softmax: ``loss.contrastive.form`` is not asked.
    """

    def __init__(self, experiment: Experiment, model: Dual, mesh: Mesh | None = None):
        self.experiment, self.mesh, self.config = experiment, mesh, model
        self.model = params_lib.abstract(model)

    def init(self, rng: jax.Array) -> Params:
        """Fresh parameters; a run starts from the source's instead."""
        return params_lib.initialise(self.config, rng)

    def encode(self, params: Params, batch: Batch, rng: jax.Array) -> Features:
        """Features [rows * views or languages, dim], those of a row beside each other."""
        model = params_lib.bind(self.model.graph, self.held(params))
        images, texts = batch["image"], batch["text"]
        pixels = augment(images, self.experiment.data.augment, rng, model.dtype)
        image = model.encode_image(pixels.reshape(-1, *pixels.shape[2:]))
        text = model.encode_text(
            texts.reshape(-1, texts.shape[2]), batch["text_mask"].reshape(-1, texts.shape[2])
        )
        return {"image": image.features, "text": text.features}

    def contrast(
        self, params: Params, features: Features, batch: Batch
    ) -> tuple[jax.Array, Metrics]:
        """The loss of a batch from the features of its rows."""
        cfg = self.experiment.loss.contrastive
        rows, languages = batch["text"].shape[:2]
        image, text = (
            features[name].reshape(rows, -1, self.config.out_dim).swapaxes(0, 1)
            for name in ("image", "text")
        )
        head = Head(jnp.exp(params["logit_scale"].astype(jnp.float32)), params.get("logit_bias"))
        ids = same_caption(batch["text"]) if cfg.mask_same_caption else None
        total, metrics = self._between(image, text, head, ids), {"scale": head.scale}
        if cfg.text_text and languages > 1:
            metrics["loss/text_text"] = self._within(text, head, ids)
            total = total + cfg.text_text * metrics["loss/text_text"]
        if cfg.image_image and len(image) > 1:
            metrics["loss/image_image"] = self._within(image, head, ids)
            total = total + cfg.image_image * metrics["loss/image_image"]
        return total, metrics

    def after_update(self, params: Params) -> Params:
        """Keeps the scale at or below ``scale_max``."""
        ceiling = math.log(self.experiment.loss.contrastive.scale_max)
        return {**params, "logit_scale": jnp.minimum(params["logit_scale"], ceiling)}

    def frozen(self, name: str) -> bool:
        """True for the tower that ``finetune.freeze`` names; a head that starts afresh is not."""
        tuned = self.experiment.finetune
        if tuned.heads == "fresh" and name.startswith(HEADS):
            return False
        tower = {"image": "vision.", "text": "text."}.get(tuned.freeze)
        return tower is not None and name.startswith(tower)

    def layer_scales(self, decay: float) -> Mapping[str, Any]:
        """See ``models.depth``."""
        return layer_scales(self.config, self.model, decay)
