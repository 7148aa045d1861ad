# SPDX-License-Identifier: Apache-2.0
"""Training a tower whose vectors can be compared with an old model's: a task of the trainer.

AdvBCT (Pan et al. 2023) whole: tower, head, discriminator and elastic boundaries in one step of
``advbct.loss``, whose running statistics are carried from step to step. Beside it what it is
compared with: BCT, UniBCT, Hot-refresh, LCE, and a model trained alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from m2jax.config import UserError
from m2jax.losses import adversarial, compatible
from m2jax.losses.compatible import OldClasses
from m2jax.models import params as params_lib
from m2jax.models.batch_norm import EPS, Affine, Running
from m2jax.models.class_tokens import ClassTokens, ClassTokenTower, from_vision_tower
from m2jax.models.params import Abstract, Params
from m2jax.tasks.embedder import Pixels
from m2jax.tasks.reid.dcformer import augment
from m2jax.tasks.retrieval import advbct
from m2jax.tasks.retrieval.advbct import Discriminator, State
from m2jax.train.task import CARRIED, Batch, Metrics

METHODS = ("advbct", "bct", "unibct", "hot-refresh", "lce", "none")
RUNNING = "running"  # statistics of the norms, which the loss carries


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is trained."""

    tower: ClassTokens
    pixels: Pixels
    method: str = "advbct"
    dim: int = 256  # numbers of a vector; the old model's
    classes: int = 0  # of the training set
    tau: float = 1.0  # where the boundaries' radii move to
    epochs: int = 30
    steps: int = 1  # of an epoch
    gray: float = 0.0  # as of DC-Former's settings; AdvBCT publishes without any change
    flip: float = 0.0
    pad: int = 0
    erase: float = 0.0


class Old(NamedTuple):
    """What is known of the old model; its classes are the first ones of the new."""

    classes: OldClasses
    angles: Float[np.ndarray, " old"]  # largest angle of each class to its centre, radians
    centres: Float[np.ndarray, "classes dim"]  # of all classes, by the old model
    classifier: Float[np.ndarray, "dim old"] | None = None  # for BCT alone


class CompatibleTask:
    """The objective.

    A batch has ``image`` uint8 [n, h, w, 3]; ``label`` and ``step`` [n]; with an old model ``old``
    [n, dim], its vectors of the images.

    Args:
        cfg: what is trained.
        old: what is known of the old model; not needed where ``method`` is none.
        start: parameters of a tower to start from: see ``from_vision_tower``.
        mesh: its devices' rows are one batch to the norms.

    Raises:
        UserError: an unknown method, or one that needs what ``old`` lacks.
    """

    def __init__(
        self,
        cfg: Settings,
        old: Old | None = None,
        start: Params | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        if cfg.method not in METHODS:
            raise UserError(f"--method {cfg.method}: use one of {', '.join(METHODS)}")
        if old is None and cfg.method != "none":
            raise UserError(f"--method {cfg.method}: needs an old model: name one, or take none")
        if cfg.method == "bct" and old is not None and old.classifier is None:
            raise UserError(
                "--method bct: needs the old model's classifier: name its folder with --old, or "
                "take another method"
            )
        self.cfg, self.mesh, self._start, self._old = cfg, mesh, start, old
        tower = params_lib.abstract_of(lambda rngs: ClassTokenTower(rngs, cfg.tower))
        beside = jax.eval_shape(lambda: _beside(jax.random.key(0), cfg))
        axes = {f"tower.{name}": found for name, found in tower.axes.items()}
        axes |= {k: (None,) * leaf.ndim for k, leaf in params_lib.flatten(beside).items()}
        self.model = Abstract(tower.graph, {"tower": tower.params, **beside}, axes)

    def init(self, rng: jax.Array) -> Params:
        """A fresh head, and a tower that is fresh or the one to start from."""
        cfg, first = self.cfg.tower, jax.random.fold_in(rng, 1)
        if self._start is not None:
            tower = from_vision_tower(self._start, cfg, first)
        else:
            tower = params_lib.initialise_of(lambda rngs: ClassTokenTower(rngs, cfg), first)
        return {"tower": tower, **_beside(rng, self.cfg)}

    def batch_spec(self, batch_size: int) -> Mapping[str, jax.ShapeDtypeStruct]:
        """Images, their classes, where in the run that is, and the old vectors."""
        cfg, whole = self.cfg, jax.ShapeDtypeStruct((batch_size,), jnp.int32)
        shape = (batch_size, cfg.pixels.height, cfg.pixels.width, 3)
        spec = {"image": jax.ShapeDtypeStruct(shape, jnp.uint8), "label": whole, "step": whole}
        if self._old is not None:
            spec["old"] = jax.ShapeDtypeStruct((batch_size, cfg.dim), jnp.float32)
        return spec

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Metrics]:
        """Classification and what keeps the vectors comparable."""
        cfg, (heads, state) = self.cfg, as_advbct(params)
        pixels = augment(batch["image"], cfg, cfg.pixels.standardised, rng)
        tokens = params_lib.bind(self.model.graph, params["tower"])(pixels)
        features = tokens.reshape(len(tokens), -1)
        if cfg.method == "advbct":
            assert self._old is not None
            step, total_steps = batch["step"][0], cfg.epochs * cfg.steps
            epoch = step // cfg.steps
            total, (terms, moved) = advbct.loss(
                heads,
                state,
                advbct.Batch(features, batch["old"], batch["label"]),
                self._old.classes,
                progress=step / total_steps,
                adversarial_weight=adversarial.adversarial_weight(epoch, cfg.epochs),
                tau=cfg.tau,
            )
            told = {
                "loss/classification": terms.classification,
                "loss/boundary": terms.boundary,
                "loss/adversarial": terms.adversarial,
                "violations": terms.violations.astype(jnp.float32),
            }
        else:
            embedding, running = advbct.embed(heads, state, features, train=True)
            moved = State(running, state.discriminator)
            ours = adversarial.cross_entropy(embedding @ heads.classifier, batch["label"])
            added = self._added(embedding, heads.classifier, batch)
            total, told = ours + added, {"loss/classification": ours, "loss/compatible": added}
        return total, {**told, CARRIED: {RUNNING: _running(moved)}}

    def _added(
        self,
        embedding: Float[Array, "n dim"],
        classifier: Float[Array, "dim classes"],
        batch: Batch,
    ) -> Float[Array, ""]:
        """The loss of a method that is not AdvBCT."""
        old, labels, method = self._old, batch["label"], self.cfg.method
        if old is None or method == "none":
            return jnp.zeros(())
        if method == "bct":
            return compatible.bct(embedding, labels, jnp.asarray(old.classifier))
        if method == "unibct":
            return compatible.unibct(embedding, labels, jnp.asarray(old.centres))
        if method == "hot-refresh":
            return compatible.hot_refresh(embedding, batch["old"], labels)
        more = (0, self.cfg.classes - len(old.angles))
        found = compatible.lce(
            embedding,
            jnp.asarray(old.centres)[labels],
            jnp.pad(jnp.asarray(old.angles), more)[labels],
            jnp.pad(jnp.asarray(old.classes.known), more)[labels],
            classifier.T[labels],
        )
        return found.boundary + found.alignment

    def after_update(self, params: Params) -> Params:
        """Nothing to project."""
        return params

    def frozen(self, name: str) -> bool:
        """Running statistics; what only AdvBCT reads, elsewhere."""
        adversary = ("discriminator.", "elastic") if self.cfg.method != "advbct" else ()
        return name.startswith((f"{RUNNING}.", *adversary))

    def layer_scales(self, decay: float) -> Mapping[str, Any]:
        """No decay over layers: the published recipe has none."""
        raise UserError("optim.layer_decay: compatible training has none: set it to 1")


def _beside(rng: jax.Array, cfg: Settings) -> Params:
    """All but the tower, by name."""
    enc = cfg.tower.tokens * cfg.tower.width
    heads, state = advbct.init(rng, enc, cfg.dim, cfg.classes)
    inner = heads.discriminator
    return {
        "projection": {"kernel": heads.projection},
        "bn": heads.bn._asdict(),
        "classifier": {"kernel": heads.classifier},
        "discriminator": {
            "fc1": {"kernel": inner.fc1, "bias": inner.fc1_bias},
            "bn": inner.bn._asdict(),
            "fc2": {"kernel": inner.fc2, "bias": inner.fc2_bias},
        },
        "elastic": heads.elastic,
        RUNNING: _running(state),
    }


def _running(state: State) -> Params:
    return {"bn": state.bn._asdict(), "discriminator": state.discriminator._asdict()}


def as_advbct(params: Params) -> tuple[advbct.Params, State]:
    """Head and statistics as ``advbct`` takes them."""
    inner, running = params["discriminator"], params[RUNNING]
    discriminator = Discriminator(
        inner["fc1"]["kernel"],
        inner["fc1"]["bias"],
        Affine(**inner["bn"]),
        inner["fc2"]["kernel"],
        inner["fc2"]["bias"],
    )
    heads = advbct.Params(
        params["projection"]["kernel"],
        Affine(**params["bn"]),
        params["classifier"]["kernel"],
        discriminator,
        params["elastic"],
    )
    return heads, State(Running(**running["bn"]), Running(**running["discriminator"]))


def folded(params: Params) -> Params:
    """Projection and norm as one linear map, for use: {"kernel", "bias"}."""
    running, bn = params[RUNNING]["bn"], params["bn"]
    gain = np.asarray(bn["scale"]) / np.sqrt(np.asarray(running["var"]) + EPS)
    kernel = np.asarray(params["projection"]["kernel"]) * gain
    return {"kernel": kernel, "bias": np.asarray(bn["bias"]) - np.asarray(running["mean"]) * gain}
