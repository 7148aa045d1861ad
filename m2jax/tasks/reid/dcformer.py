# SPDX-License-Identifier: Apache-2.0
"""DC-Former as a task of the trainer: K class tokens, a head per token, scenes taken out on demand.

Source: Li et al. 2023 (AAAI) and its published code. Each token goes through a batch normalisation
of its own (no shift) to a classifier of its own; triplet and diversity see the tokens before it,
and so does inference, which is why no running statistics are kept. Scene removal is that of
``losses.adversarial``, on the concatenated tokens, and our choice in form and weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from m2jax.config import UserError
from m2jax.losses.adversarial import reversal_ramp, scene_adversary
from m2jax.losses.diversity import Parts, dcformer_loss
from m2jax.models import layers
from m2jax.models import params as params_lib
from m2jax.models.batch_norm import EPS
from m2jax.models.class_tokens import ClassTokens, ClassTokenTower, from_vision_tower
from m2jax.models.params import Abstract, Params
from m2jax.tasks.reid.prototypes import moved
from m2jax.train.task import CARRIED, Batch, Metrics

SCENES = ("none", "reversal", "confusion")
PROTOTYPES = ("classifier", "features")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is trained."""

    tower: ClassTokens
    identities: int  # of the training set
    dynamic: bool = False  # DWC instead of SDC
    diversity: float = 1.0  # weight
    scenes: str = "none"  # none | reversal | confusion: what takes cameras out of the features
    cameras: int = 0  # for scenes; the tower's side information counts its own
    scene_weight: float = 0.1
    prototypes: str = "classifier"  # classifier | features: what hard batches are chosen by
    steps: int = 1  # of the run: over them the reversed gradient rises, as in AdvBCT
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # of RGB in [0, 1]
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    erase: float = 0.5  # share of images with a rectangle of noise (random erasing)
    gray: float = 1.0  # share of images with a rectangle turned gray, as published
    flip: float = 0.5  # share of mirrored images
    pad: int = 10  # pixels around, of which a random crop is taken


class _Heads(nnx.Module):
    """A normalisation without shift and a classifier without bias for each token."""

    def __init__(self, rngs: nnx.Rngs, tokens: int, width: int, identities: int):
        kind, small = jnp.dtype("float32"), layers.normal(0.001)
        self.scale = layers.param(
            rngs, layers.constant(1.0), (tokens, width), (None, "embed"), kind
        )
        self.kernel = layers.param(
            rngs, small, (tokens, width, identities), (None, "embed", None), kind
        )

    def __call__(self, tokens: Float[Array, "batch k width"]) -> Float[Array, "batch k ids"]:
        centred = tokens - tokens.mean(0)
        normal = centred * jax.lax.rsqrt(jnp.square(centred).mean(0) + EPS) * self.scale[...]
        return jnp.einsum("bkd,kdn->bkn", normal, self.kernel[...], precision="highest")


class _Prototypes(nnx.Module):
    """A running mean of each identity's first token; no gradient moves it."""

    def __init__(self, rngs: nnx.Rngs, identities: int, width: int):
        zero, kind = layers.constant(0.0), jnp.dtype("float32")
        self.mean = layers.param(rngs, zero, (identities, width), (None, "embed"), kind)


class DCFormer(nnx.Module):
    """The tower and its heads."""

    def __init__(self, rngs: nnx.Rngs, cfg: Settings):
        tokens, width = cfg.tower.tokens, cfg.tower.width
        self.tower = ClassTokenTower(rngs, cfg.tower)
        self.heads = _Heads(rngs, tokens, width, cfg.identities)
        shape, small = (tokens * width, cfg.cameras), layers.normal(0.001)
        self.scene = (
            layers.Linear(rngs, shape, (None, None), init=small) if cfg.scenes != "none" else None
        )
        features = cfg.prototypes == "features"
        self.prototypes = _Prototypes(rngs, cfg.identities, width) if features else None


class DCFormerTask:
    """The objective.

    A batch has ``image`` uint8 [n, h, w, 3], and ``identity``, ``camera`` and ``step`` [n].

    Args:
        cfg: what is trained.
        mesh: over all its devices the hardest pairs are found.
        start: parameters of a tower to start from, as ``bundle.params["vision"]`` of a model of
            the CLIP family; random ones if not given.

    Raises:
        UserError: settings that exclude each other.
    """

    def __init__(self, cfg: Settings, mesh: Mesh | None = None, start: Params | None = None):
        for name, known in (("scenes", SCENES), ("prototypes", PROTOTYPES)):
            if (value := getattr(cfg, name)) not in known:
                raise UserError(f"{name}={value!r}: use one of {', '.join(known)}")
        if cfg.scenes != "none" and (cfg.tower.cameras or cfg.cameras < 2):
            raise UserError(
                f"scenes={cfg.scenes}: needs two cameras or more to take out, and a tower without "
                "side information, which would put them in: change one"
            )
        self.cfg, self.mesh, self._start = cfg, mesh, start
        self.model: Abstract = params_lib.abstract_of(lambda rngs: DCFormer(rngs, cfg))

    def init(self, rng: jax.Array) -> Params:
        """Fresh heads, and a tower that is fresh or the one to start from."""
        params = params_lib.initialise_of(lambda rngs: DCFormer(rngs, self.cfg), rng)
        if self._start is not None:
            first = jax.random.fold_in(rng, 1)
            params["tower"] = from_vision_tower(self._start, self.cfg.tower, first)
        return params

    def batch_spec(self, batch_size: int) -> Mapping[str, jax.ShapeDtypeStruct]:
        """Images with who is on them, which camera took them and where in the run that is."""
        shape = (batch_size, self.cfg.tower.height, self.cfg.tower.image_width, 3)
        whole = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
        return {
            "image": jax.ShapeDtypeStruct(shape, jnp.uint8),
            "identity": whole,
            "camera": whole,
            "step": whole,  # the number of the batch in the run, n times
        }

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Metrics]:
        """DC-Former's loss, and the scene adversary's where there is one."""
        model = params_lib.bind(self.model.graph, params)
        pixels = augment(batch["image"], self.cfg, lambda x: normalised(x, self.cfg), rng)
        sides = batch["camera"] if self.cfg.tower.cameras else None
        tokens = model.tower(pixels, sides)
        parts: Parts = dcformer_loss(
            tokens,
            model.heads(tokens),
            batch["identity"],
            dynamic=self.cfg.dynamic,
            weight=self.cfg.diversity,
            mesh=self.mesh,
        )
        metrics: dict[str, Any] = {
            "loss/identity": parts.identity.mean(),
            "loss/triplet": parts.triplet.mean(),
            "loss/diverse": parts.diverse,
        }
        if self.cfg.prototypes == "features":
            seen = jax.lax.stop_gradient(tokens[:, 0])
            mean = moved(params["prototypes"]["mean"], seen, batch["identity"])
            metrics[CARRIED] = {"prototypes": {"mean": mean}}
        if self.cfg.scenes == "none":
            return parts.total, metrics
        added, told = scene_adversary(
            tokens.reshape(len(tokens), -1),
            model.scene.kernel[...],
            batch["camera"],
            form=self.cfg.scenes,
            weight=self.cfg.scene_weight,
            alpha=reversal_ramp(batch["step"][0] / self.cfg.steps),
        )
        return parts.total + added, {**metrics, "loss/scene": told}

    def after_update(self, params: Params) -> Params:
        """Nothing to project."""
        return params

    def frozen(self, name: str) -> bool:
        """All but the prototypes are trained."""
        return name.startswith("prototypes.")

    def layer_scales(self, decay: float) -> Mapping[str, Any]:
        """No decay over layers: the published recipe has none."""
        raise UserError("optim.layer_decay: DC-Former has none: set it to 1")


class Changes(Protocol):
    """What ``augment`` looks at: shares of images and pixels, as of ``Settings``."""

    @property
    def gray(self) -> float: ...  # noqa: D102

    @property
    def flip(self) -> float: ...  # noqa: D102

    @property
    def pad(self) -> int: ...  # noqa: D102

    @property
    def erase(self) -> float: ...  # noqa: D102


def normalised(images: jax.Array, cfg: Settings) -> Float[Array, "batch h w 3"]:
    """Pixels of uint8 images, standardised by the settings' mean and deviation."""
    return (images.astype(jnp.float32) / 255 - jnp.asarray(cfg.mean)) / jnp.asarray(cfg.std)


def augment(
    images: UInt8[Array, "batch h w 3"],
    cfg: Changes,
    standardised: Callable[[Array], Float[Array, "batch h w 3"]],
    rng: jax.Array,
) -> Float[Array, "batch h w 3"]:
    """The published changes in their order; erasing alone sees standardised values.

    Of the images a rectangle turned gray, mirroring and a crop of the image on black, where black
    and gray are those of a picture; then a rectangle of normal noise.
    """
    keys = jax.random.split(rng, 5)
    count, height, width, _ = images.shape
    if cfg.gray:
        here = rectangles(keys[0], count, height, width, cfg.gray)[..., None]
        images = jnp.where(here, luminance(images), images)
    if cfg.flip:
        mirrored = jax.random.bernoulli(keys[1], cfg.flip, (count, 1, 1, 1))
        images = jnp.where(mirrored, images[:, :, ::-1], images)
    if cfg.pad:
        images = _shifted(images, cfg.pad, keys[2])
    pixels = standardised(images)
    if cfg.erase:
        here = rectangles(keys[3], count, height, width, cfg.erase)[..., None]
        pixels = jnp.where(here, jax.random.normal(keys[4], pixels.shape), pixels)
    return pixels


def luminance(images: UInt8[Array, "batch h w 3"]) -> UInt8[Array, "batch h w 1"]:
    """ITU-R 601's luma of RGB as Pillow's ``L`` rounds it: 16 bits behind the point."""
    weights = jnp.asarray([19595, 38470, 7471])  # 0.299, 0.587, 0.114 of 65,536
    total = (images.astype(jnp.int32) * weights).sum(-1, keepdims=True)
    return ((total + 32768) >> 16).astype(jnp.uint8)


def _shifted(images: UInt8[Array, "n h w 3"], pad: int, rng: jax.Array) -> jax.Array:
    """A random crop of the images with black around."""
    count, height, width, _ = images.shape
    shifts = jax.random.randint(rng, (count, 2), 0, 2 * pad + 1)

    def crop(image: jax.Array, shift: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (shift[0], shift[1], 0), (height, width, 3))

    return jax.vmap(crop)(jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0))), shifts)


def rectangles(rng: jax.Array, count: int, height: int, width: int, share: float) -> Array:
    """A random rectangle of a share of the images: 2 to 40 % of the area, 0.3 to 1/0.3 high."""
    keys = jax.random.split(rng, 5)
    area = height * width * jax.random.uniform(keys[0], (count,), minval=0.02, maxval=0.4)
    log = np.log(0.3)
    aspect = jnp.exp(jax.random.uniform(keys[1], (count,), minval=log, maxval=-log))
    tall = jnp.minimum(jnp.sqrt(area * aspect), height).astype(jnp.int32)
    wide = jnp.minimum(jnp.sqrt(area / aspect), width).astype(jnp.int32)
    top = (jax.random.uniform(keys[2], (count,)) * (height - tall + 1)).astype(jnp.int32)
    left = (jax.random.uniform(keys[3], (count,)) * (width - wide + 1)).astype(jnp.int32)
    rows, columns = jnp.arange(height), jnp.arange(width)
    inside = (rows >= top[:, None]) & (rows < (top + tall)[:, None])
    beside = (columns >= left[:, None]) & (columns < (left + wide)[:, None])
    chosen = jax.random.bernoulli(keys[4], share, (count, 1, 1))
    return inside[:, :, None] & beside[:, None] & chosen
