# SPDX-License-Identifier: Apache-2.0
"""Linear probe: multinomial logistic regression on frozen features, fitted by L-BFGS.

As Radford et al. 2021 (appendix A.3) probe CLIP: no augmentation, L2 penalty on the weights and not
on the bias, its strength chosen on a part of training that is held out, then all is used. Unlike
there, features are those that retrieval ranks by, projected and of unit length: theirs are of the
layer before the projection. Figures of the two are not of one test.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from m2jax.config import UserError
from m2jax.eval import metrics as metrics_lib

STRENGTHS = tuple(10.0**power for power in range(-6, 3))  # of the penalty, per example
HELD_OUT = 0.2  # of training, to choose the strength
STEPS = 1000  # at most
TOLERANCE = 1e-5  # on the largest entry of the gradient of the mean loss


class Probe(NamedTuple):
    """A linear classifier."""

    weights: Float[np.ndarray, "dim classes"]
    bias: Float[np.ndarray, " classes"]
    strength: float


def fit(
    features: Float[np.ndarray, "examples dim"],
    labels: Int[np.ndarray, " examples"],
    classes: int,
    *,
    strength: float,
) -> Probe:
    """Minimises mean cross-entropy + strength / 2 |weights|^2.

    That is scikit-learn's LogisticRegression with C = 1 / (strength x examples).
    """
    start = jnp.zeros((features.shape[1], classes)), jnp.zeros(classes)
    weights, bias = _minimise(
        start, jnp.asarray(features, jnp.float32), jnp.asarray(labels), jnp.float32(strength)
    )
    return Probe(np.asarray(weights), np.asarray(bias), strength)


def fit_best(
    features: Float[np.ndarray, "examples dim"],
    labels: Int[np.ndarray, " examples"],
    classes: int,
    *,
    seed: int = 0,
) -> Probe:
    """Chooses the strength on held-out training examples, then fits on all of them.

    Raises:
        UserError: too few examples to hold some out.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    held = int(HELD_OUT * len(labels))
    if not held:
        raise UserError(f"linear probe: {len(labels)} training pictures: give at least 5")
    out, kept = order[:held], order[held:]
    right = [
        (
            ranks(
                fit(features[kept], labels[kept], classes, strength=s), features[out], labels[out]
            )
            < 1
        ).mean()
        for s in STRENGTHS
    ]
    # Of equal ones the strongest: the simplest classifier.
    best = max(range(len(STRENGTHS)), key=lambda i: (right[i], STRENGTHS[i]))
    return fit(features, labels, classes, strength=STRENGTHS[best])


def ranks(
    probe: Probe, features: Float[np.ndarray, "examples dim"], labels: Int[np.ndarray, " examples"]
) -> Int[np.ndarray, " examples"]:
    """Rank of the true class of each example, from 0."""
    scores = features @ probe.weights + probe.bias
    return metrics_lib.first_right(scores, labels[:, None] == np.arange(len(probe.bias)))


@functools.partial(jax.jit)
def _minimise(
    start: tuple[Array, Array], features: Array, labels: Array, strength: Array
) -> tuple[Array, Array]:
    def loss(params: tuple[Array, Array]) -> Array:
        weights, bias = params
        logits = jnp.matmul(features, weights, precision="highest") + bias
        fitted = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return fitted + strength / 2 * jnp.sum(weights**2)

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry: Any) -> Any:
        params, state, number, _ = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = solver.update(grad, state, params, value=value, grad=grad, value_fn=loss)
        largest = jnp.max(jnp.stack([jnp.abs(leaf).max() for leaf in jax.tree.leaves(grad)]))
        return optax.apply_updates(params, updates), state, number + 1, largest

    def going(carry: Any) -> Any:
        return (carry[2] < STEPS) & (carry[3] > TOLERANCE)

    begin: Any = (start, solver.init(start), 0, jnp.inf)
    return jax.lax.while_loop(going, step, begin)[0]
