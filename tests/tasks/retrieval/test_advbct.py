# SPDX-License-Identifier: Apache-2.0
"""Beyond its golden numbers: who gets a gradient, and that training makes models compatible."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from m2jax.losses.adversarial import adversarial_weight
from m2jax.losses.compatible import OldClasses
from m2jax.models.batch_norm import MOMENTUM
from m2jax.tasks import ranking
from m2jax.tasks.ranking import FeatureScores
from m2jax.tasks.retrieval import advbct, metrics
from m2jax.tasks.retrieval.statistics import class_statistics

ENC, DIM, CLASSES, OLD = 32, 16, 12, 8


def world(seed=0, each=10):
    """Features of 12 classes; the old model projects them with noise and knows 8 of the classes."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(CLASSES), each)
    features = rng.normal(size=(CLASSES, ENC))[labels] + 0.7 * rng.normal(size=(len(labels), ENC))
    projection = rng.normal(size=(ENC, DIM)) / np.sqrt(ENC)
    old = features @ projection + 0.25 * rng.normal(size=(len(labels), DIM))
    known = labels < OLD
    statistics = class_statistics(lambda: [(old[known], labels[known])], OLD)
    batch = advbct.Batch(*(jnp.asarray(x, jnp.float32) for x in (features, old)), labels)
    return batch, statistics.old_classes()


@functools.partial(jax.jit, static_argnames="bound")
def step(params, state, batch, old, progress, weight, *, bound):
    """One step of plain descent; without ``bound`` only the classification counts."""

    def loss(params):
        total, (terms, moved) = advbct.loss(
            params, state, batch, old, progress=progress, adversarial_weight=weight, tau=1.0
        )
        return (total if bound else terms.classification), (terms, moved)

    grads, (terms, state) = jax.grad(loss, has_aux=True)(params)
    return optax.apply_updates(params, jax.tree.map(lambda g: -0.3 * g, grads)), state, terms


def trained(bound, steps=60):
    batch, old = world()
    params, state = advbct.init(jax.random.key(0), ENC, DIM, CLASSES)
    for number in range(steps):
        params, state, terms = step(
            params,
            state,
            batch,
            old,
            number / steps,
            adversarial_weight(number, steps),
            bound=bound,
        )
    return params, state, terms


def cross_test(params, state):
    """mAP@10 of new queries among the old vectors of other images of known classes."""
    batch, _ = world()
    new, _ = advbct.embed(params, state, batch.features, train=False)
    labels = np.asarray(batch.labels)
    known = np.flatnonzero(labels < OLD)
    queries, gallery = known[::3], np.setdiff1d(known, known[::3])
    right = [np.flatnonzero(labels[gallery] == labels[q]) for q in queries]
    scores = FeatureScores(np.asarray(new)[queries], np.asarray(batch.old)[gallery])
    return metrics.mean_ap_at(ranking.hits(scores, right), 10).mean_ap


def test_it_makes_new_queries_find_old_vectors():
    """The cross-test is far above that of training without regard to the old model."""
    bound, free = trained(True), trained(False)
    assert bound[2].boundary < 0.3
    assert bound[2].classification < 0.3
    assert cross_test(*bound[:2]) > cross_test(*free[:2]) + 0.3


def test_the_old_model_gets_no_gradient():
    batch, old = world()
    params, state = advbct.init(jax.random.key(0), ENC, DIM, CLASSES)

    def loss(stored):
        changed = batch._replace(old=stored)
        return advbct.loss(params, state, changed, old, progress=0.5, adversarial_weight=1.0)[0]

    assert not np.asarray(jax.grad(loss)(batch.old)).any()


@pytest.mark.parametrize("progress", [0.0, 0.5])
def test_the_ramp_scales_what_the_embedding_gets_and_nothing_else(progress):
    """At the start the adversary only watches: its own gradient is whole, the embedding's is 0."""
    batch, old = world()
    params, state = advbct.init(jax.random.key(0), ENC, DIM, CLASSES)

    def gradient(weight):
        def loss(params):
            return advbct.loss(
                params, state, batch, old, progress=progress, adversarial_weight=weight
            )[0]

        return jax.grad(loss)(params)

    without, once = gradient(0.0), gradient(1.0)
    assert np.abs(once.discriminator.fc1 - without.discriminator.fc1).max() > 1e-4
    moved = np.abs(once.projection - without.projection).max()
    assert (moved > 1e-6) == (progress > 0)


def test_each_domain_moves_the_discriminators_statistics_once():
    batch, old = world()
    params, state = advbct.init(jax.random.key(0), ENC, DIM, CLASSES)
    _, (terms, after) = advbct.loss(params, state, batch, old, progress=0.0, adversarial_weight=1.0)
    d = params.discriminator
    means = [x @ d.fc1 + d.fc1_bias for x in (terms.embedding, batch.old)]
    wanted = jnp.zeros(advbct.HIDDEN)
    for mean in means:  # new first, then old
        wanted = (1 - MOMENTUM) * wanted + MOMENTUM * mean.mean(0)
    np.testing.assert_allclose(after.discriminator.mean, wanted, atol=1e-5)
    still, same = advbct.embed(params, after, batch.features, train=False)
    assert same is after.bn
    assert not np.allclose(still, terms.embedding, atol=1e-2)


def test_old_classes_may_be_none():
    """A first model: nothing bounds it, and the loss is finite."""
    batch, _ = world()
    none = OldClasses(jnp.zeros((OLD, DIM)), jnp.zeros(OLD), jnp.zeros(OLD, bool))
    params, state = advbct.init(jax.random.key(0), ENC, DIM, CLASSES)
    total, (terms, _) = advbct.loss(
        params, state, batch, none, progress=0.0, adversarial_weight=1.0
    )
    assert terms.boundary == 0
    assert np.isfinite(total)
