# SPDX-License-Identifier: Apache-2.0
"""Image-text contrast (ITC) in several languages at once: the objective of the dual encoder."""

from __future__ import annotations

import itertools
import math
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from m2jax.config import Contrastive, Experiment, Loss, UserError
from m2jax.data.augment import augment
from m2jax.losses.contrastive import contrastive_loss
from m2jax.losses.layout import TILED
from m2jax.models import params as params_lib
from m2jax.models.depth import layer_scales
from m2jax.models.m2 import Features as Encoded
from m2jax.models.m2 import M2Encoder
from m2jax.models.params import Abstract, Params
from m2jax.train.task import Batch, Features, Metrics

# What the features of each modality come from.
_SHARED = ("vl.blocks.A.", "vl.norms.A.")
TOWERS: Mapping[str, tuple[str, ...]] = types.MappingProxyType(
    {
        "image": (
            *("vision_embed.", "image_positions", "backbone.blocks.A.", "backbone.norms.A."),
            *("image_head.", "image_vl_head.", *_SHARED),
        ),
        "text": (
            *("text_embed", "text_positions", "backbone.blocks.B.", "backbone.norms.B."),
            *("text_head.", "text_vl_head.", *_SHARED),
        ),
    }
)
HEADS = ("image_head.", "text_head.", "image_vl_head.", "text_vl_head.")

# The public forward never reads these (models/m2.py); ITC gives them no gradient.
UNREAD = ("vl.blocks.B.", "vl.norms.B.", "norm.", "pooler.", "vision_embed.mask_token")
_JOINT = ("vl.blocks.B.", "vl.norms.B.")


def unread(cfg: Loss) -> tuple[str, ...]:
    """Beginnings of the names of the parameters that no objective of a run reads."""
    read: tuple[str, ...] = ()
    if cfg.masked_image.weight or cfg.masked_tokens.weight:
        read += ("vision_embed.mask_token",)
    if (cfg.masked_text.weight or cfg.masked_tokens.weight) and cfg.joint_vl != "A":
        read += _JOINT
    return tuple(name for name in UNREAD if name not in read)


BIASES = ("logit_bias", "logit_vl_bias")  # of the sigmoid loss, beside the model's own scales


class Head(NamedTuple):
    """What turns cosines into logits."""

    scale: jax.Array
    bias: jax.Array | None  # None: softmax


class Forward(NamedTuple):
    """Both towers on a batch; rows are (row, view) and (row, language) pairs."""

    pixels: Float[Array, "images size size 3"]  # augmented, in [0, 1]
    image: Encoded
    text: Encoded

    @property
    def features(self) -> Features:
        """What the contrast needs of them."""
        return {
            "image": self.image.features,
            "text": self.text.features,
            "backbone_image": self.image.backbone_features,
            "backbone_text": self.text.backbone_features,
        }


class ImageTextTask:
    """Each view of an image against its text in each language, on backbone and vl features.

    The loss is the mean over views and languages of ``contrastive_loss``; the backbone's features
    and ``logit_scale`` weigh ``backbone_weight``, those of the vl layers and ``logit_vl_scale`` the
    rest, as VLMo (which the release derives from) trains both heads. ``text_text`` and
    ``image_image`` add the contrasts inside a modality, on vl features. With ``form=sigmoid`` each
    scale has a bias beside it; training alone needs them, so the model knows nothing of them.

    Raises:
        UserError: options of the loss that exclude each other.
    """

    def __init__(self, experiment: Experiment, mesh: Mesh | None = None):
        _check(experiment.loss.contrastive)
        self.experiment = experiment
        self.mesh = mesh
        self.model: Abstract = params_lib.abstract(experiment.model)
        self._of_model = tuple(self.model.params)
        self._unread = unread(experiment.loss)
        self._sigmoid = experiment.loss.contrastive.form == "sigmoid"
        if self._sigmoid:
            biases = dict.fromkeys(BIASES, jax.ShapeDtypeStruct((), jnp.float32))
            axes: dict[str, tuple[str | None, ...]] = dict.fromkeys(BIASES, ())
            self.model = self.model._replace(
                params={**self.model.params, **biases}, axes={**self.model.axes, **axes}
            )

    def init(self, rng: jax.Array) -> Params:
        """Fresh parameters with the scales of the config."""
        params = params_lib.initialise(self.experiment.model, rng)
        start = math.log(self.experiment.loss.contrastive.scale_init)
        for name in ("logit_scale", "logit_vl_scale"):
            params[name] = jnp.full_like(params[name], start)
        if self._sigmoid:
            bias = jnp.asarray(self.experiment.loss.contrastive.bias_init, jnp.float32)
            params |= dict.fromkeys(BIASES, bias)
        return params

    def batch_spec(self, batch_size: int) -> Mapping[str, jax.ShapeDtypeStruct]:
        """RGBA views, and one text per language."""
        cfg = self.experiment
        side, text = cfg.model.image_size, (len(cfg.data.languages), cfg.model.max_text_len)
        return {
            "image": jax.ShapeDtypeStruct((batch_size, cfg.data.views, side, side, 4), jnp.uint8),
            "text": jax.ShapeDtypeStruct((batch_size, *text), jnp.int32),
            "text_mask": jax.ShapeDtypeStruct((batch_size, *text), jnp.bool_),
            "concept": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
        }

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Metrics]:
        """Augments, encodes views and texts in one call each, and contrasts them."""
        return self.contrast(params, self.encode(params, batch, rng), batch)

    def encode(self, params: Params, batch: Batch, rng: jax.Array) -> Features:
        """Features [rows * views or languages, dim], those of a row beside each other."""
        return self.forward(params, batch, rng).features

    def bind(self, params: Params) -> M2Encoder:
        """The encoder itself; of ``params`` it takes what is its own."""
        own = {name: params[name] for name in self._of_model}
        return params_lib.bind(self.model.graph, self.held(own))

    def forward(self, params: Params, batch: Batch, rng: jax.Array) -> Forward:
        """Both towers on a batch."""
        model = self.bind(params)
        keys = jax.random.split(rng, 3)
        images, texts = batch["image"], batch["text"]
        # Views and languages are folded into the rows they belong to, so a device keeps its rows;
        # only the features, which are small, are then put in order view by view.
        pixels = augment(images, self.experiment.data.augment, keys[0], model.dtype)
        pixels = pixels.reshape(-1, *pixels.shape[2:])
        image = model.encode_image(pixels, rng=keys[1])
        text = model.encode_text(
            texts.reshape(-1, texts.shape[2]),
            batch["text_mask"].reshape(-1, texts.shape[2]),
            rng=keys[2],
        )
        return Forward(pixels, image, text)

    def contrast(
        self, params: Params, features: Features, batch: Batch
    ) -> tuple[jax.Array, Metrics]:
        """The loss of a batch from the features of its rows."""
        cfg = self.experiment.loss.contrastive
        rows, views = batch["image"].shape[:2]
        languages = batch["text"].shape[1]

        def by_part(name: str, parts: int) -> jax.Array:
            return features[name].reshape(rows, parts, -1).swapaxes(0, 1)

        vl_head, head = self._head(params, "logit_vl_"), self._head(params, "logit_")
        ids = same_caption(batch["text"]) if cfg.mask_same_caption else None
        vl_image, vl_text = by_part("image", views), by_part("text", languages)
        vl = self._between(vl_image, vl_text, vl_head, ids)
        first = self._between(
            by_part("backbone_image", views), by_part("backbone_text", languages), head, ids
        )
        total = cfg.backbone_weight * first + (1 - cfg.backbone_weight) * vl
        metrics = {"loss/vl": vl, "loss/backbone": first, "scale": vl_head.scale}
        if cfg.text_text and languages > 1:
            metrics["loss/text_text"] = self._within(vl_text, vl_head, ids)
            total = total + cfg.text_text * metrics["loss/text_text"]
        if cfg.image_image and views > 1:
            metrics["loss/image_image"] = self._within(vl_image, vl_head, ids)
            total = total + cfg.image_image * metrics["loss/image_image"]
        return cfg.weight * total, metrics

    def after_update(self, params: Params) -> Params:
        """Keeps both scales at or below ``scale_max`` (CLIP's ceiling of ln 100)."""
        ceiling = math.log(self.experiment.loss.contrastive.scale_max)
        clipped = {
            name: jnp.minimum(params[name], ceiling) for name in ("logit_scale", "logit_vl_scale")
        }
        return {**params, **clipped}

    def frozen(self, name: str) -> bool:
        """True for what ``finetune.freeze`` names, and for what no objective here reads.

        The vl layers' A weights belong to both towers. A head that starts afresh is never frozen.
        """
        tuned = self.experiment.finetune
        if tuned.heads == "fresh" and name.startswith(HEADS):
            return False
        return name.startswith((*self._unread, *TOWERS.get(tuned.freeze, ())))

    def layer_scales(self, decay: float) -> Mapping[str, Any]:
        """See ``models.depth``."""
        return layer_scales(self.experiment.model, self.model, decay)

    def held(self, params: Params) -> Params:
        """The parameters, with no gradient into a frozen tower, so that none is computed."""
        if not self.experiment.finetune.freeze:
            return params
        return jax.tree_util.tree_map_with_path(
            lambda path, x: jax.lax.stop_gradient(x) if self.frozen(params_lib.dotted(path)) else x,
            params,
        )

    def _head(self, params: Params, stem: str) -> Head:
        bias = params[f"{stem}bias"] if self._sigmoid else None
        return Head(jnp.exp(params[f"{stem}scale"]), bias)

    def _between(
        self, image: jax.Array, text: jax.Array, head: Head, ids: jax.Array | None
    ) -> jax.Array:
        """Mean over every (view, language) pair."""
        of_text = [None] * len(text) if ids is None else list(ids)
        pairs = itertools.product(image, zip(text, of_text, strict=True))
        return jnp.stack([self._contrast(i, t, head, same) for i, (t, same) in pairs]).mean()

    def _within(self, features: jax.Array, head: Head, ids: jax.Array | None) -> jax.Array:
        """Mean over every pair of two views, or of two languages; the first language names rows."""
        same = None if ids is None else ids[0]
        pairs = list(itertools.combinations(features, 2))
        return jnp.stack([self._contrast(a, b, head, same) for a, b in pairs]).mean()

    def _contrast(self, a: jax.Array, b: jax.Array, head: Head, ids: jax.Array | None) -> jax.Array:
        cfg = self.experiment.loss.contrastive
        return contrastive_loss(
            a,
            b,
            head.scale,
            bias=head.bias,
            impl=cfg.impl,
            mesh=self.mesh,
            group=cfg.group or None,
            ids=ids,
            label_smoothing=cfg.label_smoothing,
            wire_dtype=cfg.wire_dtype,
            tile=cfg.tile,
            kernel=cfg.kernel,
        )


def _check(cfg: Contrastive) -> None:
    if cfg.label_smoothing and (cfg.form == "sigmoid" or cfg.mask_same_caption):
        other = "form=sigmoid" if cfg.form == "sigmoid" else "mask_same_caption=True"
        raise UserError(
            f"loss.contrastive.label_smoothing={cfg.label_smoothing}: does not go with "
            f"loss.contrastive.{other}: set one of them back"
        )
    if cfg.kernel != "xla" and cfg.impl not in TILED:
        raise UserError(
            f"loss.contrastive.kernel={cfg.kernel}: impl={cfg.impl} has no tiles: use kernel=xla "
            f"or one of {', '.join(TILED)}"
        )


def same_caption(text: Int[Array, "rows languages tokens"]) -> Int[Array, "languages rows"]:
    """A number per caption, equal for equal captions (and for 1 in 2 ** 32 of the others)."""

    def fold(code: jax.Array, token: jax.Array) -> tuple[jax.Array, None]:
        mixed = (code ^ token.astype(jnp.uint32)) * jnp.uint32(0x01000193)  # FNV-1a
        return mixed ^ (mixed >> 15), None

    start = jnp.full(text.shape[:2], 0x811C9DC5, jnp.uint32)
    code, _ = jax.lax.scan(fold, start, jnp.moveaxis(text, 2, 0))
    return jax.lax.bitcast_convert_type(code, jnp.int32).T
