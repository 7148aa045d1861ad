# SPDX-License-Identifier: Apache-2.0
"""Training a visual tokenizer, and taking a trained one into a run that tells its tokens.

Two runs follow each other: one with ``loss.visual_tokenizer.weight`` that starts from a trained
encoder (``--init``), whose patch features it learns to tell; and one with
``loss.masked_tokens.weight`` or ``loss.masked_image.target=tokens`` that names the first one's work
directory. The first reads no texts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from m2jax import bundle
from m2jax.checkpoint import manager
from m2jax.config import Experiment, UserError
from m2jax.data.augment import augment
from m2jax.dist.sharding import AxisRules
from m2jax.losses import masked as masked_lib
from m2jax.losses import quantised
from m2jax.models import params as params_lib
from m2jax.models.params import Abstract, Params
from m2jax.models.visual_tokenizer import VisualTokenizer
from m2jax.train.image_text import ImageTextTask
from m2jax.train.task import Batch, Metrics

TOKENIZER = "visual_tokenizer"  # where its parameters lie, beside those of an encoder


class VisualTokenizerTask:
    """VQ-KD (BEiT v2) on the first view of every row.

    With ``target=features`` the encoder of the run is the teacher and stays as it is: its patch
    features, in the space it shares with texts, are told. With ``target=pixels`` each patch's
    normalised pixels are, and there is no encoder: such a run ends without scores.

    Raises:
        UserError: no teacher to learn from, or one that no target needs.
    """

    def __init__(self, experiment: Experiment, mesh: Mesh | None = None):
        cfg, init = experiment.loss.visual_tokenizer, experiment.finetune.init
        self._teaches = cfg.target == "features"
        if self._teaches and not init:
            raise UserError(
                "loss.visual_tokenizer.target=features: no model to learn from: name one with "
                "--init, or set it to pixels"
            )
        if not self._teaches and (init or experiment.eval.suite):
            key = "finetune.init" if init else "eval.suite"
            raise UserError(
                f"loss.visual_tokenizer.target=pixels: such a run has no encoder: set {key} to ''"
            )
        self.experiment = experiment
        self.itc = ImageTextTask(experiment, mesh)
        self.tokenizer: Abstract = abstract_tokenizer(experiment)
        axes = {f"{TOKENIZER}.{name}": value for name, value in self.tokenizer.axes.items()}
        alone = Abstract(self.tokenizer.graph, {TOKENIZER: self.tokenizer.params}, axes)
        both = params_lib.beside(self.itc.model, TOKENIZER, self.tokenizer)
        self.model: Abstract = both if self._teaches else alone

    def init(self, rng: jax.Array) -> Params:
        """Fresh parameters; those of the teacher come from ``--init``."""
        own = fresh_tokenizer(self.experiment, rng)
        return {**(self.itc.init(rng) if self._teaches else {}), TOKENIZER: own}

    def batch_spec(self, batch_size: int) -> Mapping[str, jax.ShapeDtypeStruct]:
        """As of ``ImageTextTask``."""
        return self.itc.batch_spec(batch_size)

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Metrics]:
        """The distillation loss, its parts, and the share of the codebook that the batch uses."""
        cfg = self.experiment.loss.visual_tokenizer
        dtype = jax.numpy.dtype(self.experiment.model.dtype)
        pixels = augment(batch["image"][:, :1], self.experiment.data.augment, rng, dtype)[:, 0]
        tokenizer = params_lib.bind(self.tokenizer.graph, params[TOKENIZER])
        found = tokenizer.quantise(pixels)
        told = tokenizer.decode(quantised.straight_through(found.codes, found.words))
        loss, parts = quantised.distillation_loss(
            told,
            self._target(params, pixels),
            found.codes,
            found.words,
            commitment=cfg.commitment,
        )
        used = quantised.words_in_use(found.ids, cfg.codes)
        metrics = {"tokenizer/cosine": parts.cosine, "tokenizer/gap": parts.gap}
        return cfg.weight * loss, {**metrics, "tokenizer/words_in_use": used}

    def _target(self, params: Params, pixels: jax.Array) -> jax.Array:
        """What the decoder should tell of each patch."""
        if not self._teaches:
            return masked_lib.patch_targets(pixels, self.experiment.model.patch_size)
        return self.itc.bind(jax.lax.stop_gradient(params)).encode_patches(pixels)

    def after_update(self, params: Params) -> Params:
        """Nothing to project."""
        return params

    def frozen(self, name: str) -> bool:
        """All but the tokenizer."""
        return not name.startswith(f"{TOKENIZER}.")

    def layer_scales(self, decay: float) -> Mapping[str, Any]:
        """One rate for all layers."""
        return dict.fromkeys(params_lib.flatten(self.model.params), 1.0)


def abstract_tokenizer(experiment: Experiment) -> Abstract:
    """Shapes and axes of the tokenizer of ``loss.visual_tokenizer``, beside the run's encoder."""
    return params_lib.abstract_of(lambda rngs: _make(experiment, rngs))


def fresh_tokenizer(experiment: Experiment, rng: jax.Array) -> Params:
    """Fresh parameters of it; ``rng`` is that of the whole run's."""
    return params_lib.initialise_of(
        lambda rngs: _make(experiment, rngs), jax.random.fold_in(rng, 3)
    )


def _make(experiment: Experiment, rngs: nnx.Rngs) -> VisualTokenizer:
    return VisualTokenizer(rngs, experiment.model, experiment.loss.visual_tokenizer)


def visual_tokens(
    tokenizer: Abstract, params: Params, pixels: Float[Array, "batch height width 3"]
) -> Int[Array, "batch patches"]:
    """The visual token of every patch, by the frozen tokenizer among a run's parameters."""
    frozen = jax.lax.stop_gradient(params[TOKENIZER])
    return params_lib.bind(tokenizer.graph, frozen).quantise(pixels).ids


def read_tokenizer(experiment: Experiment, tokenizer: Abstract, mesh: Mesh) -> Params:
    """The parameters of the trained tokenizer that an objective's ``tokenizer`` names.

    Args:
        experiment: a run with ``loss.masked_tokens``, ``loss.masked_image.target=tokens`` or both.
        tokenizer: shapes and axes that it must have.
        mesh: where they go.

    Raises:
        UserError: none is named, or two, or it is no such run or one with other sizes.
    """
    key, name = _named(experiment)
    directory = Path(name)
    if not directory.is_dir():
        raise UserError(f"{key}={name}: no such directory: name a work directory")
    checkpoint = bundle.checkpoint_of(directory)
    saved = manager.read_bundle(checkpoint).experiment if checkpoint else None
    if checkpoint is None or saved is None or not saved.loss.visual_tokenizer.weight:
        raise UserError(
            f"{key}={name}: trained no visual tokenizer: name a run with "
            "loss.visual_tokenizer.weight=1"
        )
    _check_sizes(experiment, saved, f"{key}={name}")
    shapes = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        tokenizer.params,
        params_lib.shardings(tokenizer, mesh, AxisRules()),
    )
    return manager.read_params(checkpoint.absolute(), {TOKENIZER: shapes})[TOKENIZER]


def _named(experiment: Experiment) -> tuple[str, str]:
    """The setting that names the tokenizer's run, and that run; objectives share one tokenizer."""
    cfg, found = experiment.loss, {}
    if cfg.masked_tokens.weight:
        found["CMIM"] = "loss.masked_tokens.tokenizer", cfg.masked_tokens.tokenizer
    if cfg.masked_image.weight and cfg.masked_image.target == "tokens":
        found["TG-MIM of tokens"] = "loss.masked_image.tokenizer", cfg.masked_image.tokenizer
    for objective, (key, name) in found.items():
        if not name:
            raise UserError(
                f"{key}='': {objective} needs a trained visual tokenizer: train one "
                "with loss.visual_tokenizer.weight=1 and name its work directory"
            )
    (key, name), *others = found.values()
    for other, its in others:
        if its != name:
            raise UserError(f"{other}={its}: {key} is {name}: a run has one tokenizer: name one")
    return key, name


def _check_sizes(experiment: Experiment, saved: Experiment, where: str) -> None:
    """Refuses a tokenizer of other sizes; those left at 0 are the model's."""

    def sizes(cfg: Experiment) -> dict[str, Any]:
        own, model = cfg.loss.visual_tokenizer, cfg.model
        depth = own.encoder_layers or model.backbone_layers + model.vl_layers
        resolved = dataclasses.replace(
            own,
            weight=0.0,
            commitment=0.0,
            width=own.width or model.width,
            heads=own.heads or model.heads,
            encoder_layers=depth,
        )
        of_model = {f"model.{key}": getattr(model, key) for key in ("image_size", "patch_size")}
        if own.target == "features":
            of_model["model.out_dim"] = model.out_dim
        own_sizes = dataclasses.asdict(resolved).items()
        return {**{f"loss.visual_tokenizer.{k}": v for k, v in own_sizes}, **of_model}

    want, have = sizes(experiment), sizes(saved)
    for key in have:
        if want.get(key) != have[key]:
            raise UserError(
                f"{where}: {key} is {have[key]} there and {want.get(key)} here: make them alike"
            )
