# SPDX-License-Identifier: Apache-2.0
"""Self-supervised keyframes: of each few frames that follow each other, the one that is kept.

SSAN (Jiang et al., ACM MM 2021) trains its extractor by a classification over a group of frames.
How is not public; this is our reconstruction. Frames are cut into windows, a small network gives
each frame a logit from the features around it and from its place, and a window's class is the frame
that is most similar to the window as an edited copy shows it. Kept frames stand for the time up to
halfway to their neighbours: the end at the next keyframe would move all segments by half a window.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Int64

MIDDLE = 4.0  # 1 of 4 frames: the middle is kept by 95 draws in 100
AROUND = 5  # frames that a logit looks at, and 3 more in the second layer


class Scorer(nnx.Module):
    """A logit for each frame, by two convolutions over time and by its place in the window.

    Frames that are chosen at random lie at uneven distances, which a detector has to learn to
    read; so the choice starts at each window's middle and leaves it where that pays.

    Args:
        dim: of the features.
        hidden: channels between.
        window: frames of which one is kept.
        middle: the logit that the middle of a window has ahead of its others at first.
        rngs: of the first parameters.
    """

    def __init__(
        self, dim: int, hidden: int, window: int, *, middle: float = MIDDLE, rngs: nnx.Rngs
    ) -> None:
        self.first = nnx.Conv(dim, hidden, (AROUND,), rngs=rngs)
        self.second = nnx.Conv(hidden, 1, (3,), kernel_init=nnx.initializers.zeros, rngs=rngs)
        self.place = nnx.Param(jnp.zeros(window).at[(window - 1) // 2].set(middle))

    def __call__(self, features: Float[Array, "batch frames dim"]) -> Float[Array, "batch frames"]:
        """Logits; before training they keep each window's middle frame.

        Args:
            features: the first frame begins a window.
        """
        # Unit rows have entries of 1 / sqrt(dim): brought to the size that layers start with.
        scaled = features * features.shape[-1] ** 0.5
        seen = self.second(jax.nn.silu(self.first(scaled)))[..., 0]
        return seen + jnp.resize(self.place[...], seen.shape[-1:])


def classes(
    features: Float[Array, "*windows frames dim"],
    views: Float[Array, "*windows frames dim"],
    real: Bool[Array, "*windows frames"],
) -> Int[Array, "*windows"]:
    """The frame of each window that is most similar to all of the window's other view.

    argmax over i of the mean over j of <f_i, f'_j>.

    Args:
        features: unit rows.
        views: of the same frames, edited.
        real: frames that are there in both.
    """
    sums = (views * real[..., None]).sum(axis=-2)
    likeness = jnp.einsum("...id,...d->...i", features, sums)
    return jnp.where(real, likeness, -jnp.inf).argmax(axis=-1)


def loss(
    logits: Float[Array, "*windows frames"],
    target: Int[Array, "*windows"],
    real: Bool[Array, "*windows frames"],
) -> Float[Array, ""]:
    """Cross-entropy over each window's frames, the mean of windows with two frames or more."""
    masked = jnp.where(real, logits, -1e9)
    each = optax.losses.softmax_cross_entropy_with_integer_labels(masked, target)
    counted = real.sum(axis=-1) > 1
    return jnp.where(counted, each, 0.0).sum() / jnp.maximum(counted.sum(), 1)


def pick(
    logits: Float[Array, "batch windows frames"],
    real: Bool[Array, "batch windows frames"],
    rng: Array | None = None,
) -> Float[Array, "batch windows frames"]:
    """Weights of each window's frames: 1 for the kept one, with the gradient of a softmax.

    Straight-through Gumbel-softmax (Jang et al., ICLR 2017); without ``rng`` the highest is kept.
    """
    if rng is not None:
        logits = logits + jax.random.gumbel(rng, logits.shape)
    masked = jnp.where(real, logits, -1e9)
    soft = jax.nn.softmax(masked, axis=-1)
    hard = jax.nn.one_hot(masked.argmax(axis=-1), logits.shape[-1], dtype=logits.dtype)
    return hard + soft - jax.lax.stop_gradient(soft)


def uniform(length: int, window: int) -> Int64[np.ndarray, " keyframes"]:
    """The middle frame of each window."""
    first = np.arange(0, length, window)
    return (first + np.minimum(first + window, length) - 1) // 2


def highest(logits: Float[np.ndarray, " frames"], window: int) -> Int64[np.ndarray, " keyframes"]:
    """The frame of each window with the highest logit."""
    behind = np.pad(logits, (0, -len(logits) % window), constant_values=-np.inf)
    own = behind.reshape(-1, window)
    return np.arange(0, len(behind), window) + own.argmax(axis=1)


def unlike(
    features: Float[np.ndarray, "frames dim"], kept: Int64[np.ndarray, " keyframes"], most: float
) -> Int64[np.ndarray, " fewer"]:
    """Keyframes without those whose cosine with the one kept before is above ``most``."""
    found = [int(kept[0])]
    for frame in kept[1:].tolist():
        if features[frame] @ features[found[-1]] <= most:
            found.append(frame)
    return np.array(found, np.int64)


def edges(
    kept: Int64[np.ndarray, " keyframes"], length: int
) -> Float[np.ndarray, " keyframes_and_1"]:
    """Where the time of each keyframe starts, in frames, and where the video ends.

    Args:
        kept: frames, ascending.
        length: frames of the video.
    """
    middle = (kept[:-1] + kept[1:] + 1) / 2
    return np.concatenate([[0.0], middle, [float(length)]])


def in_time(
    boxes: Float[np.ndarray, "segments 4"],
    query: Float[np.ndarray, " query_edges"],
    reference: Float[np.ndarray, " reference_edges"],
) -> Float[np.ndarray, "segments 4"]:
    """Segments counted in keyframes, in frames; ends are exclusive.

    Args:
        boxes: [query start, reference start, query end, reference end] between keyframes, parts of
            one included.
        query: ``edges`` of the query.
        reference: of the reference.
    """
    found = np.array(boxes, np.float64).reshape(-1, 4)
    for side, own in ((0, query), (1, reference)):
        for column in (side, side + 2):
            found[:, column] = np.interp(found[:, column], np.arange(len(own)), own)
    return found
