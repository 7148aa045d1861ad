# SPDX-License-Identifier: Apache-2.0
"""SSAN: keyframes and the detector of copied segments, trained alone or together.

Jiang et al., ACM MM 2021. The detector's loss reaches the keyframe extractor through the similarity
map of the frames that it chose, by a straight-through Gumbel-softmax: how the paper does so is not
public, this is our reconstruction. A map of all frames is that of windows of one frame.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float

from m2jax.config import UserError
from m2jax.losses import detection
from m2jax.tasks.video import examples, keyframes, patches
from m2jax.tasks.video.detector import Detector, Seen, places
from m2jax.tasks.video.examples import Batch, Corpus
from m2jax.tasks.video.keyframes import Scorer

HIDDEN = 64  # channels of the keyframe extractor
FRAMES = 128  # of either video of an example, about
REPORT = 50  # steps between lines

Kind = Literal["spd", "ske", "ssan"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is trained, and how."""

    kind: Kind = "spd"  # the detector, the keyframe extractor, or both together
    window: int = 1  # frames of which one is kept; the extractor needs 2 and more
    size: int = 128  # pixels of the detector's square; longer maps are pooled
    width: int = 8  # channels of its first layer
    simulated: float = 0.5  # share of examples that are simulated
    steps: int = 500
    batch: int = 16
    learning_rate: float = 4e-3
    ske_weight: float = 0.1  # of the extractor's own loss beside the detector's
    box_weight: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(get_type_hints(Settings)["kind"]):
            raise UserError(f"kind={self.kind!r:.40}: use spd, ske or ssan")
        if self.size % 16 or not 32 <= self.size <= 1280:
            raise UserError(f"size={self.size}: choose a multiple of 16 from 32 to 1,280")
        if self.width % 4 or not 4 <= self.width <= 256:
            raise UserError(f"width={self.width}: choose a multiple of 4 from 4 to 256")
        if not 1 <= self.window <= 64 or (self.kind != "spd" and self.window < 2):
            raise UserError(f"window={self.window}: choose 1 to 64; keyframes need 2 and more")
        if not 0 <= self.simulated <= 1:
            raise UserError(f"simulated={self.simulated}: choose 0 to 1")
        if min(self.steps, self.batch) < 1 or not self.learning_rate > 0:
            raise UserError("steps, batch: at least 1; learning_rate: above 0")

    @property
    def frames(self) -> int:
        """Of either video of an example, at most: whole windows, no map larger than the square."""
        return min(FRAMES, self.window * self.size) // self.window * self.window


@dataclass(frozen=True)
class Part:
    """What is trained beside a backbone."""

    settings: Settings
    dim: int  # of the features
    detector: Any = None  # the state of a ``Detector``, or none
    scorer: Any = None  # of a ``Scorer``: without one keyframes are each window's middle
    model: str = ""  # fingerprint of the backbone, where it is known
    report: dict[str, Any] = field(default_factory=dict)


class Losses(NamedTuple):
    """Terms of a step."""

    total: Array
    box: Array
    score: Array
    ske: Array


def new_detector(settings: Settings) -> Detector:
    """With first parameters."""
    return Detector(settings.size, settings.width, rngs=nnx.Rngs(settings.seed))


def new_scorer(settings: Settings, dim: int) -> Scorer:
    """With first parameters."""
    return Scorer(dim, HIDDEN, settings.window, rngs=nnx.Rngs(settings.seed + 1))


class Kept(NamedTuple):
    """Keyframes of a batch of videos, and the extractor's loss on them."""

    features: Float[Array, "batch windows dim"]
    edges: Float[Array, "batch windows_and_1"]  # frames; see ``keyframes.edges``
    number: Float[Array, " batch"]  # of keyframes
    loss: Float[Array, ""]


def _keep(
    scorer: Scorer | None,
    features: Float[Array, "batch frames dim"],
    lengths: Array,
    shown: Float[Array, "batch frames dim"],
    seen: Bool[Array, "batch frames"],
    window: int,
    rng: Array | None,
) -> Kept:
    """Chooses a frame of each window; ``shown`` and ``seen`` are the other views of the frames."""
    batch, frames, dim = features.shape
    cut = (batch, frames // window, window)
    real = (jnp.arange(frames)[None] < lengths[:, None]).reshape(cut)
    count = -(-lengths // window)
    if scorer is None:
        index = jnp.minimum(window, real.sum(axis=-1, keepdims=True)) - 1
        weights = jax.nn.one_hot(jnp.maximum(index, 0)[..., 0] // 2, window)
        loss = jnp.zeros(())
    else:
        logits = scorer(features).reshape(cut)
        weights = keyframes.pick(logits, real, rng)
        windows, views = (x.reshape(*cut, dim) for x in (features, shown))
        both = seen.reshape(cut) & real
        loss = keyframes.loss(logits, keyframes.classes(windows, views, both), both)
    weights = weights * real
    kept = jnp.einsum("bkw,bkwd->bkd", weights, features.reshape(*cut, dim))
    hard = jax.lax.stop_gradient(weights).argmax(axis=-1)
    frame = jnp.arange(cut[1]) * window + hard
    middle = (frame[:, :-1] + frame[:, 1:] + 1) / 2
    line = jnp.pad(middle, ((0, 0), (1, 1)))
    past = jnp.arange(cut[1] + 1)[None] >= count[:, None]  # where the video is over
    return Kept(kept, jnp.where(past, lengths[:, None], line), count, loss)


def _masked(similarity: Float[Array, "batch query reference"]) -> Array:
    """``patches.mask`` within a batch; zeros behind a map are never among the highest."""
    clipped = jnp.clip(similarity, 0, 1)
    if clipped.shape[-1] <= patches.TOP:
        return clipped
    least = jax.lax.stop_gradient(jax.lax.top_k(clipped, patches.TOP)[0][..., -1:])
    return jnp.where(clipped >= least, clipped, 0)


def _into(cells: int, scale: Array, own: Array, size: int) -> Float[Array, "batch size cells"]:
    """``patches.taps`` of maps of different sizes in one array of ``cells``."""
    pixels = jnp.round(own * scale)
    before = jnp.round((size - pixels) / 2 - 0.1)
    place = (jnp.arange(size)[None] - before[:, None] + 0.5) * (own / pixels)[:, None] - 0.5
    inside = (place > -0.5) & (place < own[:, None] - 0.5)
    held = jnp.clip(place, 0, own[:, None] - 1)
    near = jnp.maximum(1 - jnp.abs(held[..., None] - jnp.arange(cells)), 0)
    return near * inside[..., None]


def _squares(
    similarity: Array, query: Array, reference: Array, size: int
) -> tuple[Array, Array, Array]:
    """Letterboxed maps [batch, size, size], and scale and offset (x, y) of each."""
    scale = size / jnp.maximum(query, reference)
    rows = _into(similarity.shape[1], scale, query, size)
    columns = _into(similarity.shape[2], scale, reference, size)
    squares = jnp.einsum("bpi,bij,bqj->bpq", rows, similarity, columns)
    offset = (size - jnp.stack([reference, query], axis=1) * scale[:, None]) / 2
    return squares, scale, offset


def _counted(frames: Float[Array, "batch boxes 2"], kept: Kept) -> Array:
    """Times in frames as places between keyframes."""
    line = jnp.arange(kept.edges.shape[1], dtype=jnp.float32)
    found = jax.vmap(jnp.interp, (0, 0, None))(frames, kept.edges, line)
    return jnp.minimum(found, kept.number[:, None, None])


def losses(
    detector: Detector | None,
    scorer: Scorer | None,
    batch: Batch,
    rng: Array | None,
    settings: Settings,
) -> Losses:
    """The loss of a batch; its total is the detector's plus the extractor's times its weight.

    Args:
        detector: or none, for the extractor alone.
        scorer: or none, for all frames or each window's middle.
        batch: examples.
        rng: of the choice of keyframes; without it the best are kept.
        settings: weights, window and size.
    """
    sides = []
    for side, own, other in ((0, batch.query, batch.reference), (1, batch.reference, batch.query)):
        views = jnp.asarray(batch.views)[:, side]
        shown = jnp.take_along_axis(other, jnp.maximum(views, 0)[..., None], axis=1)
        key = None if rng is None else jax.random.fold_in(rng, side)
        lengths = jnp.asarray(batch.lengths)[:, side]
        sides.append(_keep(scorer, own, lengths, shown, views >= 0, settings.window, key))
    query, reference = sides
    ske = (query.loss + reference.loss) / 2
    zero = jnp.zeros(())
    if detector is None:
        return Losses(ske, zero, zero, ske)
    similarity = jnp.einsum("bid,bjd->bij", query.features, reference.features)
    squares, scale, offset = _squares(
        _masked(similarity), query.number, reference.number, settings.size
    )
    y = _counted(batch.boxes[..., 0::2], query)
    x = _counted(batch.boxes[..., 1::2], reference)
    truth = jnp.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], axis=-1)
    truth = truth * scale[:, None, None] + jnp.tile(offset, 2)[:, None]
    truth = jax.lax.stop_gradient(truth)
    seen: Seen = detector(squares)
    where = map(jnp.asarray, places(settings.size))
    terms = detection.loss(seen.logits, seen.boxes, truth, batch.real, *where)
    total = settings.box_weight * terms.box + terms.score + settings.ske_weight * ske
    return Losses(total, terms.box, terms.score, ske)


def train(
    corpus: Corpus | None,
    settings: Settings,
    *,
    dim: int = 64,
    start: Part | None = None,
    model: str = "",
    say: Callable[[str], None] = lambda line: None,
) -> Part:
    """Fits a detector, a keyframe extractor, or both.

    Args:
        corpus: labelled pairs; ``None``: simulated ones alone.
        settings: what and how.
        dim: of the features, where there is no corpus.
        start: parts to begin with. For ``spd`` its keyframe extractor is used as it is; for
            ``ssan`` what it has goes on to be trained.
        model: fingerprint of the features' backbone.
        say: gets a line every 50 steps.

    Raises:
        UserError: the corpus does not hang together, the parts do not fit, or the loss is
            no number.
    """
    if corpus is not None:
        dim = examples.check(corpus, "video train")
    if start is not None:
        _check_start(start, settings, dim)
    modules = _modules(settings, dim, start)
    split = {name: nnx.split(module) for name, module in modules.items()}
    graphs = tuple((name, graph) for name, (graph, _) in split.items())
    params = {name: state for name, (_, state) in split.items()}
    fixed = {"scorer": params.pop("scorer")} if settings.kind == "spd" and len(params) > 1 else {}
    state = _transform(settings).init(params)
    compiled = dataclasses.replace(settings, seed=0)  # which changes no code
    rng, key = np.random.default_rng(settings.seed), jax.random.key(settings.seed)
    history: list[Losses] = []
    for number in range(settings.steps):
        one = examples.batch(
            corpus,
            rng,
            size=settings.batch,
            frames=settings.frames,
            dim=dim,
            share=settings.simulated,
        )
        own = jax.random.fold_in(key, number)
        params, state, found = _step(params, fixed, state, one, own, graphs, compiled)
        history.append(found)
        if (number + 1) % REPORT == 0 or number + 1 == settings.steps:
            recent = _means(history[-REPORT:])
            if not np.isfinite(recent["total"]):
                raise UserError("video train: the loss is no number: lower the learning rate")
            shown = ", ".join(f"{name} {value:.3f}" for name, value in recent.items())
            say(f"step {number + 1:,}/{settings.steps:,}: {shown}")
    report = {"first": _means(history[:REPORT]), "last": _means(history[-REPORT:])}
    found = params | fixed
    return Part(settings, dim, found.get("detector"), found.get("scorer"), model, report)


@functools.partial(jax.jit, static_argnames=("graphs", "settings"))
def _step(
    params: Any,
    fixed: Any,
    state: Any,
    batch: Batch,
    rng: Array,
    graphs: tuple[tuple[str, Any], ...],
    settings: Settings,
) -> tuple[Any, Any, Losses]:
    """One step: parameters, the optimiser's state and the losses before it."""

    def loss(params: Any) -> tuple[Array, Losses]:
        states = {**params, **fixed}
        whole = {name: nnx.merge(graph, states[name]) for name, graph in graphs}
        found = losses(whole.get("detector"), whole.get("scorer"), batch, rng, settings)
        return found.total, found

    gradient, found = jax.grad(loss, has_aux=True)(params)
    updates, state = _transform(settings).update(gradient, state, params)
    return optax.apply_updates(params, updates), state, found


def _modules(settings: Settings, dim: int, start: Part | None) -> dict[str, Any]:
    """What takes part in a training, with the values it begins with."""
    found: dict[str, Any] = {}
    if settings.kind != "ske":
        found["detector"] = new_detector(settings)
    if settings.kind != "spd" or (start is not None and start.scorer is not None):
        found["scorer"] = new_scorer(settings, dim)
    for name, module in found.items():
        begun = None if start is None else getattr(start, name)
        if begun is not None:
            nnx.update(module, begun)
    return found


def _check_start(start: Part, settings: Settings, dim: int) -> None:
    wanted = {"window": settings.window}
    if start.detector is not None:
        wanted |= {"size": settings.size, "width": settings.width}
    for name, value in wanted.items():
        there = getattr(start.settings, name)
        # A detector may go on to other windows; an extractor chooses from those it was trained on.
        if there != value and not (name == "window" and start.scorer is None):
            raise UserError(f"--start: was trained with {name} {there}, not {value}: use the same")
    if start.scorer is not None and start.dim != dim:
        raise UserError(
            f"--start: its keyframe extractor takes features of {start.dim} numbers, not {dim}: "
            "train one on these"
        )


def _transform(settings: Settings) -> optax.GradientTransformation:
    """AdamW with a warm-up over a tenth of the steps and a cosine to 0."""
    warm = max(1, settings.steps // 10)
    rate = optax.schedules.warmup_cosine_decay_schedule(
        0.0, settings.learning_rate, warm, max(settings.steps, warm + 1)
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=1e-3))


def _means(history: list[Losses]) -> dict[str, float]:
    return {n: float(np.mean([getattr(one, n) for one in history])) for n in Losses._fields}
