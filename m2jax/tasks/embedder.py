# SPDX-License-Identifier: Apache-2.0
"""A trained image embedder as a folder, ``embedder.json`` and ``embedder.safetensors``.

What re-identification and compatible training make: a tower with class tokens, and a linear head
where there is one. It stands wherever a model's ``preprocess`` and ``encode_image`` are asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int, UInt8
from PIL import Image

from m2jax import bundle
from m2jax.config import UserError
from m2jax.config_dual import Dual
from m2jax.config_values import from_mapping
from m2jax.data.image import Preprocess
from m2jax.models import params as params_lib
from m2jax.models.class_tokens import ClassTokens, ClassTokenTower, tower_of
from m2jax.models.params import Params
from m2jax.models.stack import ACTIVATIONS
from m2jax.tasks import part_folder
from m2jax.tasks.part_folder import Layout

LAYOUT = Layout("embedder", "m2jax reid train or retrieval train-compatible")
CLASSIFIER = "classifier"
INSIDE = "model"  # of the folder of a run
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """How images become what a tower takes."""

    height: int
    width: int
    mean: tuple[float, ...] = HALF  # of RGB in [0, 1]
    std: tuple[float, ...] = HALF

    def of(
        self, images: Sequence[Image.Image], resample: Image.Resampling = Image.Resampling.BILINEAR
    ) -> UInt8[np.ndarray, "images h w 3"]:
        """RGB on white, resized without regard to proportions, as re-identification does."""
        rgb = Preprocess(1, background="white").rgb
        found = np.empty((len(images), self.height, self.width, 3), np.uint8)
        for row, image in enumerate(images):
            found[row] = np.asarray(rgb(image).resize((self.width, self.height), resample))
        return found

    def standardised(self, images: Array) -> Float[Array, "images h w 3"]:
        """Values of uint8 images by mean and deviation."""
        return (images.astype(jnp.float32) / 255 - jnp.asarray(self.mean)) / jnp.asarray(self.std)


@dataclass(frozen=True, kw_only=True)
class Embedder:
    """A tower, maybe a head, and what it takes."""

    tower: ClassTokens
    pixels: Pixels
    params: Params  # {"tower": ..., "head": {"kernel": [k * width, dim], "bias": [dim]}}
    classifier: Float[np.ndarray, "dim classes"] | None = None  # it was trained with
    report: Mapping[str, Any] = field(default_factory=dict)

    @property
    def cameras(self) -> int:
        """That the tower has embeddings for; 0: it takes no side information."""
        return self.tower.cameras

    def preprocess(self, images: Sequence[Image.Image]) -> UInt8[np.ndarray, "images h w 3"]:
        """Pixels of PIL images, ready for ``encode_image``."""
        return self.pixels.of(images)

    def encode_image(
        self,
        pixels: UInt8[np.ndarray, "images h w 3"],
        cameras: Int[np.ndarray, " images"] | None = None,
    ) -> Float[Array, "images dim"]:
        """Features of unit length: the tokens side by side, or what the head makes of them.

        Args:
            pixels: of ``preprocess``.
            cameras: of each image, for a tower with side information; without, it gets none.

        Raises:
            UserError: a camera that the tower has not seen.
        """
        sides = None
        if self.cameras and cameras is not None:
            if len(cameras) and not 0 <= cameras.min() <= cameras.max() < self.cameras:
                raise UserError(
                    f"camera {cameras.max()}: the model knows {self.cameras}: embed without cameras"
                )
            sides = jnp.asarray(cameras)
        return _encode(self.tower, self.pixels, self.params, jnp.asarray(pixels), sides)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _encode(
    cfg: ClassTokens, pixels: Pixels, params: Params, images: Array, cameras: Array | None
) -> Float[Array, "images dim"]:
    tokens = params_lib.bind(_graph(cfg), params["tower"])(pixels.standardised(images), cameras)
    found = tokens.reshape(len(tokens), -1)
    if "head" in params:
        found = found @ params["head"]["kernel"] + params["head"]["bias"]
    return found / jnp.maximum(jnp.linalg.norm(found, axis=1, keepdims=True), 1e-12)


@functools.cache
def _abstract(cfg: ClassTokens) -> params_lib.Abstract:
    return params_lib.abstract_of(lambda rngs: ClassTokenTower(rngs, cfg))


def _graph(cfg: ClassTokens) -> nnx.GraphDef:
    return _abstract(cfg).graph


def write(directory: Path, made: Embedder) -> None:
    """Makes the folder, whole or not at all.

    Raises:
        UserError: it exists or cannot be made.
    """
    card = {
        "tower": asdict(made.tower),
        "pixels": asdict(made.pixels),
        "report": dict(made.report),
    }
    tensors: dict[str, Float32[np.ndarray, ...]] = {
        name: np.ascontiguousarray(leaf, np.float32)
        for name, leaf in params_lib.flatten(made.params).items()
    }
    if made.classifier is not None:
        tensors[CLASSIFIER] = np.ascontiguousarray(made.classifier, np.float32)
    part_folder.write(directory, LAYOUT, card, tensors)


def is_folder(directory: Path) -> bool:
    """Whether a folder is an embedder's, or that of a run that made one."""
    return (located(directory) / LAYOUT.card).is_file()


def located(directory: Path) -> Path:
    """The embedder's folder of a run, or the folder itself."""
    return directory / INSIDE if (directory / INSIDE).is_dir() else directory


def read(directory: Path) -> Embedder:
    """The folder of ``write``, or a run that ended with one; checked, as it may come from anywhere.

    Raises:
        UserError: no such folder, another format, or numbers that do not fit together.
    """
    where = located(directory)
    card, tensors = part_folder.read(where, LAYOUT)
    file = where / LAYOUT.card
    try:
        tower = from_mapping(ClassTokens, card["tower"], f"{file}: tower")
        pixels = from_mapping(Pixels, card["pixels"], f"{file}: pixels")
        report = dict(card["report"])
        if tower.activation not in ACTIVATIONS:
            raise ValueError(f"activation {tower.activation!r:.40}")
        sizes = pixels.height, pixels.width
        if sizes != (tower.height, tower.image_width) or min(pixels.std) <= 0:
            raise ValueError("the pixels are not the tower's")
        classifier = tensors.pop(CLASSIFIER, None)
        params = _fitted(tensors, tower)
        if classifier is not None and len(classifier) != params["head"]["kernel"].shape[1]:
            raise ValueError("the classifier is of other vectors")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{where}: damaged ({error!r:.200}): copy it again") from error
    return Embedder(tower=tower, pixels=pixels, params=params, classifier=classifier, report=report)


def _fitted(tensors: Mapping[str, np.ndarray], tower: ClassTokens) -> Params:
    """The tensors as parameters, compared with those the sizes ask for."""
    expected: Params = {"tower": _abstract(tower).params}
    if "head.kernel" in tensors:
        rows, dim = tower.tokens * tower.width, tensors["head.kernel"].shape[-1]
        shapes = {"kernel": (rows, dim), "bias": (dim,)}
        expected["head"] = {
            name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()
        }
    shapes = {name: leaf.shape for name, leaf in params_lib.flatten(expected).items()}
    if shapes != {name: each.shape for name, each in tensors.items()}:
        raise ValueError("the tensors are not those of the sizes")
    if not all(each.dtype == np.float32 and np.isfinite(each).all() for each in tensors.values()):
        raise ValueError("a number is none")
    leaves = [jnp.asarray(tensors[name]) for name in params_lib.flatten(expected)]
    return jax.tree.unflatten(jax.tree.structure(expected), leaves)


class Start(NamedTuple):
    """What a training begins with."""

    tower: ClassTokens
    pixels: Pixels
    params: Params | None  # for ``from_vision_tower``; none: from nothing


def start_from(path: str, **changes: Any) -> Start:
    """The image tower of a trained model.

    Args:
        path: whatever ``m2jax.load`` takes.
        **changes: fields of the tower that are the new model's own: tokens, height, stride.

    Raises:
        UserError: no model there, or one without a class token.
    """
    source = bundle.load(path)
    tower, params = tower_of(source.config, **changes), source.params
    pixels = Pixels(height=tower.height, width=tower.image_width)
    if isinstance(source.config, Dual):
        vision, params = source.config.vision, source.params["vision"]
        pixels = replace(pixels, mean=vision.mean, std=vision.std)
    return Start(tower, pixels, params)


def start_small(**changes: Any) -> Start:
    """A tower that trains from nothing on a CPU."""
    sizes: dict[str, Any] = {"width": 96, "layers": 3, "heads": 3, "patch_size": 4}
    sizes |= {"height": 32, "image_width": 32} | changes
    sizes.setdefault("stride", (sizes["patch_size"],) * 2)
    tower = ClassTokens(mlp_width=4 * sizes["width"], **sizes)
    return Start(tower, Pixels(height=tower.height, width=tower.image_width), None)
