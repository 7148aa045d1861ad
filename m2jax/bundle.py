# SPDX-License-Identifier: Apache-2.0
"""A trained model with all it takes to use it: parameters, tokenizer, preprocessing.

``load`` never returns random weights; only ``create_model`` may.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int
from PIL import Image

from m2jax import architectures
from m2jax import config as config_lib
from m2jax.checkpoint import hub, manager, remote
from m2jax.checkpoint.convert import inward
from m2jax.config import UserError
from m2jax.config_dual import Architecture, Dual
from m2jax.data import stores
from m2jax.data.image import Preprocess
from m2jax.data.text import Tokenizer, Tokens, tokenizer_from_dict
from m2jax.dist.mesh import make_mesh
from m2jax.dist.sharding import AxisRules, gathered, mesh_of, replicated, spread
from m2jax.models import layers
from m2jax.models import params as params_lib
from m2jax.models.dual import DualEncoder
from m2jax.models.m2 import M2Encoder
from m2jax.models.params import Params

SIGMOID_BIAS = "logit_vl_bias"  # that a run with the sigmoid loss trained beside the vl features


@dataclass(frozen=True)
class Bundle:
    """A dual encoder, ready to use."""

    config: Architecture
    graph: nnx.GraphDef
    params: Params
    tokenizer: Tokenizer | None  # an imported model may come without one
    preprocessing: Preprocess
    logit_bias: jax.Array | None = None  # an M2-Encoder's, trained with the sigmoid loss

    @property
    def model(self) -> M2Encoder | DualEncoder:
        """The module itself, for what the methods below do not offer."""
        return params_lib.bind(self.graph, self.params)

    def encode_image(
        self, pixels: Float[Array, "batch height width 3"] | Float[np.ndarray, "batch h w 3"]
    ) -> Float[Array, "batch dim"]:
        """Features of RGB images in [0, 1]; unit rows."""
        return self._rows(_image_features, pixels)

    @property
    def patch_grid(self) -> int:
        """Patches of a side that ``encode_patches`` gives; 0: the family has none."""
        cfg = self.config
        return 0 if isinstance(cfg, Dual) else cfg.image_size // cfg.patch_size

    def encode_patches(
        self, pixels: Float[Array, "batch height width 3"] | Float[np.ndarray, "batch h w 3"]
    ) -> Float[Array, "batch patches dim"]:
        """Features of each patch in the space of the texts, row by row; unit rows.

        Those are the image head's maps of the patch tokens, which the head was trained for on [CLS]
        alone: what they tell is to be measured (``eval/scenes.py``), not taken for granted.

        Raises:
            UserError: a model of another family.
        """
        if not self.patch_grid:
            raise UserError(f"{self.config.name}: has no patch features: use an M2-Encoder")
        return self._rows(_patch_features, pixels)

    def encode_text(
        self,
        ids: Int[Array, "batch length"] | Int[np.ndarray, "batch length"],
        mask: Bool[Array, "batch length"] | Bool[np.ndarray, "batch length"],
    ) -> Float[Array, "batch dim"]:
        """Features of token ids (mask: 1 for tokens, 0 for padding); unit rows."""
        return self._rows(_text_features, ids, mask)

    def _rows(self, encode: Callable[..., jax.Array], *inputs: Any) -> jax.Array:
        """Encodes where the parameters lie: on one device, or each of a mesh its share of the rows.

        All processes of a mesh call this with the same inputs and get the same, whole, features.
        """
        mesh = self.mesh
        rows = [spread(each, mesh) for each in inputs]
        found, count = encode(self.graph, mesh, self.params, *rows), len(inputs[0])
        return found if len(found) == count else found[:count]

    @property
    def mesh(self) -> Mesh | None:
        """The devices that share the parameters and the rows; ``None`` where it is one device."""
        leaf = jax.tree.leaves(self.params)[0]
        return mesh_of(leaf) if isinstance(leaf, jax.Array) else None

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Token ids and mask of texts, ready for ``encode_text``.

        Raises:
            UserError: the model was imported without a tokenizer.
        """
        if self.tokenizer is None:
            raise UserError(
                f"{self.config.name}: has no tokenizer: import it again with --tokenizer DIR"
            )
        return self.tokenizer(texts)

    def preprocess(self, images: Sequence[Image.Image]) -> Float[np.ndarray, "batch size size 3"]:
        """Pixels of PIL images, ready for ``encode_image``."""
        return self.preprocessing(images)

    def logits(
        self,
        image_features: Float[Array, "images dim"],
        text_features: Float[Array, "texts dim"],
    ) -> Float[Array, "images texts"]:
        """Cosines times exp(logit_scale), plus logit_bias where the model has one (SigLIP).

        An M2-Encoder trained with the sigmoid loss takes the pair that its vl features were
        trained with; the published ones take ``logit_scale`` for them (their release does).
        """
        scale, bias = self.params["logit_scale"], self.params.get("logit_bias", jnp.zeros(()))
        if self.logit_bias is not None:
            scale, bias = self.params["logit_vl_scale"], self.logit_bias
        scale, bias = (  # half-precision weights would round the logits, by 1 in 2,048
            jnp.asarray(x, layers.at_least_float32(jnp.result_type(x))) for x in (scale, bias)
        )
        return jnp.exp(scale) * (image_features @ text_features.T) + bias


@functools.partial(jax.jit, static_argnums=(0, 1))
def _image_features(
    graph: nnx.GraphDef, mesh: Mesh | None, params: Params, pixels: jax.Array
) -> jax.Array:
    with gathered(mesh) as whole:
        return whole(params_lib.bind(graph, params).encode_image(pixels).features)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _patch_features(
    graph: nnx.GraphDef, mesh: Mesh | None, params: Params, pixels: jax.Array
) -> jax.Array:
    with gathered(mesh) as whole:
        return whole(params_lib.bind(graph, params).encode_patches(pixels))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _text_features(
    graph: nnx.GraphDef, mesh: Mesh | None, params: Params, ids: jax.Array, mask: jax.Array
) -> jax.Array:
    with gathered(mesh) as whole:
        return whole(params_lib.bind(graph, params).encode_text(ids, mask).features)


def load(
    path: str | os.PathLike[str], *, dtype: str = "float32", mesh: Mesh | None = None
) -> Bundle:
    """Loads a trained model.

    Args:
        path: a work directory (its newest checkpoint is taken), one checkpoint folder, a model
            folder made by ``convert``, a folder made by ``export``, ``hf:OWNER/NAME`` (with
            ``@REVISION`` if need be): such a folder on the Hugging Face Hub, or the ``s3://`` or
            ``gs://`` address of a work directory.
        dtype: precision of the computation; parameters keep theirs.
        mesh: where the parameters are laid out by the usual rules; one device if not given.

    Raises:
        UserError: there is no such directory, or nothing readable in it.
    """
    directory = local_directory(path)
    mesh = mesh or make_mesh(config_lib.Mesh(), jax.local_devices()[:1])
    checkpoint = checkpoint_of(directory)
    if checkpoint is None:
        return _load_exported(directory, dtype, mesh)
    saved = manager.read_bundle(checkpoint)
    abstract = params_lib.abstract(_for_use(saved.model, dtype, mesh))
    shapes = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        abstract.params,
        params_lib.shardings(abstract, mesh, AxisRules()),
    )
    if _is_sigmoid(saved.experiment):
        shapes[SIGMOID_BIAS] = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))
    params = manager.read_params(checkpoint.absolute(), shapes)
    return around(saved, params, dtype=dtype, mesh=mesh)


def around(saved: manager.Saved, params: Params, *, dtype: str = "float32", mesh: Mesh) -> Bundle:
    """A model of parameters that are here already, such as those of a run as it trains.

    Args:
        saved: config, tokenizer and preprocessing, as a checkpoint keeps them.
        params: of the model by name; others (of heads, say) are left out.
        dtype: precision of the computation.
        mesh: where the parameters lie.
    """
    model = _for_use(saved.model, dtype, mesh)
    abstract, tokenizer = params_lib.abstract(model), saved.assets["tokenizer"]
    return Bundle(
        model,
        abstract.graph,
        {name: params[name] for name in abstract.params},
        None if tokenizer is None else tokenizer_from_dict(tokenizer),
        Preprocess.from_dict(saved.assets["preprocess"], _side(model)),
        params[SIGMOID_BIAS] if _is_sigmoid(saved.experiment) else None,
    )


def _is_sigmoid(experiment: config_lib.Experiment | None) -> bool:
    """Whether a run trained a bias beside the scale of its logits."""
    return experiment is not None and experiment.loss.contrastive.form == "sigmoid"


def read_saved(path: str | os.PathLike[str]) -> manager.Saved | None:
    """Config, tokenizer and preprocessing of what ``load`` takes, without its parameters.

    Returns:
        ``None`` for a folder in another format, whose config comes with its parameters alone.

    Raises:
        UserError: there is no such directory, or nothing readable in it.
    """
    checkpoint = checkpoint_of(local_directory(path))
    return None if checkpoint is None else manager.read_bundle(checkpoint)


def resolved(path: str | os.PathLike[str]) -> str:
    """The name of the checkpoint that ``load`` would take now; "" for a folder in another format.

    Raises:
        UserError: there is no such directory, or nothing readable in it.
    """
    checkpoint = checkpoint_of(local_directory(path))
    return "" if checkpoint is None else checkpoint.name


def local_directory(path: str | os.PathLike[str]) -> Path:
    """The folder itself, or the copy of one on the Hub or on an object store.

    Raises:
        UserError: it cannot be had, or is no folder.
    """
    if hub.is_hub(path):
        directory = hub.download(path)
    else:
        directory = remote.fetched(str(path)) if stores.is_remote(path) else Path(path)
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory: name a work directory or a checkpoint")
    return directory


def _for_use(model: Architecture, dtype: str, mesh: Mesh) -> Architecture:
    """The config of a model as it is run here; its function and its parameters stay."""
    one_cpu = mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"
    return dataclasses.replace(model, dtype=dtype, attention="sample" if one_cpu else "batch")


def _side(model: Architecture) -> int:
    """Pixels of a side of the images a model takes."""
    return model.vision.image_size if isinstance(model, Dual) else model.image_size


def checkpoint_of(directory: Path) -> Path | None:
    """The checkpoint that a folder is or holds; ``None`` for a folder in another format."""
    if (directory / "bundle").is_dir():
        return directory
    if not manager.folder(directory).is_dir() and inward.detect(directory) is not None:
        return None
    return manager.newest(directory)


def _load_exported(directory: Path, dtype: str, mesh: Mesh) -> Bundle:
    """A folder in another format, read as ``convert`` reads it but not checked."""
    imported = inward.read(directory, mesh=mesh)
    model = _for_use(imported.config, dtype, mesh)
    graph = params_lib.abstract(model).graph
    return Bundle(model, graph, imported.params, imported.tokenizer, imported.preprocess)


def list_models() -> list[str]:
    """Names of the architectures ``create_model`` knows."""
    return list(architectures.ARCHITECTURES)


def create_model(name: str, *, seed: int = 0, **overrides: object) -> M2Encoder:
    """A model with random weights, for training from scratch or for looking at.

    Args:
        name: one of ``list_models()``.
        seed: of the initial values.
        **overrides: fields of ``config.Model``.

    Raises:
        UserError: an unknown name or sizes that do not fit together.
    """
    cfg = config_lib.resolve(config_lib.Model(name=name, **overrides))  # type: ignore[arg-type]
    abstract = params_lib.abstract(cfg)
    return params_lib.bind(abstract.graph, params_lib.initialise(cfg, jax.random.key(seed)))
