# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2jax.losses import adversarial, compatible
from m2jax.losses.diversity import self_diverse
from m2jax.losses.margins import arcface
from m2jax.models.batch_norm import EPS, Affine, Running, batch_norm


def old_classes(radii=(0.4, 0.9, 0.0), known=(True, True, False)):
    centres = np.eye(4, dtype=np.float32)[: len(radii)] * 0.8
    return compatible.OldClasses(centres, np.array(radii, np.float32), np.array(known))


@pytest.mark.parametrize("tau", [0.5, 1.0])
def test_boundaries_move_towards_tau_and_never_past(tau):
    weights = jnp.linspace(-9, 9, 7)
    for radius in (0.2, 0.7, 1.3):
        radii, _ = compatible.elastic_boundary(weights, jnp.full(7, radius), jnp.ones(7, bool), tau)
        assert np.all(np.diff(np.abs(np.asarray(radii) - tau)) <= 0)
        assert np.all((radii - tau) * (radius - tau) >= -1e-6)


def test_rows_that_bound_nothing():
    """Classes without statistics or of one image, and rows inside, cost nothing at all."""
    features = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    labels = np.array([2, 3, 3])
    found = compatible.boundary(features, labels, jnp.zeros(5), old_classes(), tau=1.0)
    assert found.loss == 0
    assert found.violations == 0
    assert not np.asarray(found.elastic)[3:].any()
    grad = jax.grad(
        lambda x: compatible.boundary(x, labels, jnp.zeros(5), old_classes(), tau=1.0).loss
    )(features)
    assert not np.asarray(grad).any()


def test_the_mean_is_over_violations():
    """A row more that lies inside its boundary changes nothing."""
    outside, inside = -np.eye(4, dtype=np.float32)[0], np.eye(4, dtype=np.float32)[0]

    def loss(rows):
        labels = np.zeros(len(rows), int)
        return compatible.boundary(np.stack(rows), labels, jnp.zeros(3), old_classes(), tau=1.0)

    assert loss([outside]).loss == pytest.approx(loss([outside, inside, inside]).loss)
    assert loss([outside, inside]).violations == 1


def test_bct_leaves_new_classes_out():
    rng = np.random.default_rng(0)
    features, kernel = rng.normal(size=(4, 6)), rng.normal(size=(6, 3))
    labels = np.array([0, 2, 3, 7])
    found = compatible.bct(features, labels, kernel)
    want = adversarial.cross_entropy(jnp.asarray(features[:2] @ kernel), labels[:2])
    assert found == pytest.approx(float(want), rel=1e-6)
    assert not np.asarray(jax.grad(compatible.bct, 2)(features, labels, kernel)).any()
    grad = jax.grad(compatible.bct)(features, labels, kernel)
    assert not np.asarray(grad)[2:].any()
    assert compatible.bct(features, np.full(4, 9), kernel) == 0


def test_unibct_prefers_the_own_centre():
    centres = np.eye(5, dtype=np.float32)
    right = compatible.unibct(centres, np.arange(5), centres)
    wrong = compatible.unibct(np.roll(centres, 1, axis=0), np.arange(5), centres)
    assert right < 0.01 < wrong
    grad = jax.grad(lambda x: compatible.unibct(x, np.arange(5), centres))(centres)
    assert np.isfinite(grad).all()  # at cosines of 1, where the arc cosine has no derivative


def test_arcface_leaves_unlabelled_rows_alone():
    cosines = jnp.array([[0.5, -0.2], [1.0, -1.0]])
    found = arcface(cosines, jnp.array([-1, 0]), scale=10.0, margin=0.5)
    np.testing.assert_allclose(found[0], [5.0, -2.0], rtol=1e-6)
    assert found[1, 0] == pytest.approx(10 * np.cos(0.5), rel=1e-3)


def test_reversal_and_confusion_pull_features_off_the_classifier():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(12, 5)).astype(np.float32)
    kernel = rng.normal(size=(5, 3)).astype(np.float32)
    scenes = rng.integers(0, 3, 12)

    def of(form):
        def loss(x, w):
            return adversarial.scene_adversary(x, w, scenes, form=form, weight=0.3, alpha=0.5)[0]

        return jax.grad(loss, (0, 1))(features, kernel)

    plain = jax.grad(lambda x, w: adversarial.cross_entropy(x @ w, scenes), (0, 1))(
        features, kernel
    )
    reversal, confusion = of("reversal"), of("confusion")
    np.testing.assert_allclose(reversal[0], -0.15 * plain[0], atol=1e-6)
    for found in (reversal, confusion):  # the classifier learns as if alone
        np.testing.assert_allclose(found[1], plain[1], atol=1e-6)
    pull = jax.grad(lambda x: adversarial.uniform_confusion(x @ kernel))(features)
    np.testing.assert_allclose(confusion[0], 0.3 * pull, atol=1e-6)
    with pytest.raises(ValueError, match="use reversal or confusion"):
        of("both")


def test_diversity_of_special_tokens():
    """Orthogonal tokens cost nothing, opposite ones as much as equal ones, one token nothing."""
    eye = jnp.eye(4)[None]
    assert self_diverse(eye) == 0
    assert self_diverse(jnp.stack([eye[0, 0], -eye[0, 0]])[None]) == pytest.approx(1)
    assert self_diverse(eye[:, :1]) == 0
    two = jax.random.normal(jax.random.key(0), (5, 2, 8))
    assert self_diverse(two) == pytest.approx(float(self_diverse(two, dynamic=True)), rel=1e-6)


def test_batch_norm_as_torch_has_it():
    x = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    affine, running = Affine(jnp.full(3, 2.0), jnp.ones(3)), Running(jnp.zeros(3), jnp.ones(3))
    found, moved = batch_norm(x, affine, running, train=True)
    want = (x - x.mean(0)) / np.sqrt(x.var(0) + EPS) * 2 + 1
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(moved.var, 0.9 + 0.1 * x.var(0, ddof=1), rtol=1e-6)
    still, same = batch_norm(x, affine, moved, train=False)
    assert same is moved
    np.testing.assert_allclose(
        still, (x - moved.mean) / np.sqrt(moved.var + EPS) * 2 + 1, rtol=1e-5, atol=1e-6
    )
