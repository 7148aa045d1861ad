# SPDX-License-Identifier: Apache-2.0
"""Against scikit-learn, an independent implementation, and against worked cases."""

import numpy as np
import pytest
import sklearn.linear_model
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from m2jax.config import UserError
from m2jax.eval import probe, prompts, zero_shot
from m2jax.eval.sets.records import Question
from tests.eval.pictures import ColourModel, unit


@given(seed=st.integers(0, 9999), steps=st.sampled_from([2, 50, None]), classes=st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_average_precision_equals_scikit_learn(seed, steps, classes):
    """With many equal scores, some, and none."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(40, classes))
    scores = scores if steps is None else np.round(scores * steps) / steps
    shown = rng.random(scores.shape) < 0.3
    shown[0] = True  # every class is shown
    found = zero_shot.average_precision(scores, shown, np.ones((1, 40)))[0]
    expected = [
        sklearn.metrics.average_precision_score(shown[:, c], scores[:, c]) for c in range(classes)
    ]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    # A picture drawn twice weighs twice.
    times = rng.integers(0, 3, 40).astype(float)
    times[0] = 1
    found = zero_shot.average_precision(scores, shown, times[None])[0]
    expected = [
        sklearn.metrics.average_precision_score(shown[:, c], scores[:, c], sample_weight=times)
        for c in range(classes)
    ]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_map_leaves_out_classes_that_no_picture_shows():
    scores = np.array([[0.9, 0.1, 0.3], [0.2, 0.8, 0.4]])
    shown = np.array([[True, False, False], [False, True, False]])
    found = zero_shot.multi_label(scores, shown)["map"].share
    assert found.value == 1
    assert found.low <= 1 <= found.high
    with pytest.raises(UserError, match="no picture has a label"):
        zero_shot.multi_label(scores, np.zeros_like(shown))


@given(seed=st.integers(0, 9999))
@settings(max_examples=30, deadline=None)
def test_top_k_and_balanced_accuracy_equal_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    images, weights = (unit(rng.normal(size=(n, 12))) for n in (70, 9))
    labels = np.r_[:9, rng.integers(0, 9, 61)]  # scikit-learn warns of a class that no picture has
    found = zero_shot.classification(images, weights, labels)
    scores = images @ weights.T
    for k in (1, 5):
        expected = sklearn.metrics.top_k_accuracy_score(labels, scores, k=k, labels=np.arange(9))
        assert found[f"top{k}"].share.value == pytest.approx(expected, abs=1e-12)
    expected = sklearn.metrics.balanced_accuracy_score(labels, scores.argmax(1))
    assert found["mean_per_class"].share.value == pytest.approx(expected, abs=1e-12)
    assert found["mean_per_class"].share.low < expected < found["mean_per_class"].share.high


def test_more_pictures_than_are_scored_at_once(monkeypatch):
    monkeypatch.setattr(zero_shot, "ROWS", 7)
    rng = np.random.default_rng(0)
    images, weights = (unit(rng.normal(size=(n, 4))) for n in (20, 6))
    labels = (images @ weights.T).argmax(1)
    assert zero_shot.classification(images, weights, labels)["top1"].share.value == 1


def test_a_constant_score_earns_nothing_and_one_class_is_refused():
    images = np.ones((6, 2), np.float32)
    found = zero_shot.classification(images, np.ones((3, 2)), np.arange(6) % 3)
    assert found["top1"].share.value == 0
    with pytest.raises(UserError, match="one class alone"):
        zero_shot.classification(images, np.ones((1, 2)), np.zeros(6, int))


def test_an_ensemble_is_the_mean_of_unit_rows_made_a_unit_row():
    model = ColourModel()
    found = zero_shot.classifier(
        model, [("red",), ("green", "blue")], ["{c}", "a {c} thing"], batch=3
    )
    names = unit(np.array([(20, 200, 20), (20, 20, 220)]))
    np.testing.assert_allclose(found[0], unit(np.array([220, 20, 20])), atol=1e-6)
    np.testing.assert_allclose(found[1], unit(names.mean(0)), atol=1e-6)
    assert sorted(model.texts) == sorted(
        ["red", "a red thing", "green", "a green thing", "blue", "a blue thing"]
    )


def test_every_prompt_has_a_place_for_the_name_and_both_languages_as_many():
    for templates in (prompts.TEMPLATES, prompts.PLAIN, prompts.BIRDS, prompts.DOGS, prompts.CARS):
        assert len(templates["en"]) == len(templates["zh"])
        for texts in templates.values():
            assert all(text.count("{c}") == 1 for text in texts)
            assert len(set(texts)) == len(texts)


def test_a_choice_earns_its_credit_and_a_tie_the_least():
    asked = [
        Question(0, ["a", "b"], [1.0, 0.0]),
        Question(0, ["a", "b", "c"], [0.0, 0.6, 0.3]),
        Question(0, ["a", "b"], [0.0, 1.0]),
    ]
    scores = [np.array([2.0, 1.0]), np.array([0.0, 3.0, 3.0]), np.array([1.0, 1.0])]
    found = zero_shot.choice(scores, asked)["accuracy"]
    assert found.share.value == pytest.approx((1 + 0.3 + 0) / 3)
    assert zero_shot.guessing(asked) == pytest.approx((0.5 + 0.3 + 0.5) / 3)
    with pytest.raises(UserError, match="not a number"):
        zero_shot.choice([np.array([np.nan, 1.0])], asked[:1])


def test_questions_about_one_picture_are_one_example():
    """Ten times the same question says nothing new: the interval must not get narrower."""
    once = [Question(i, ["a", "b"], [1.0, 0.0]) for i in range(40)]
    scores = [np.array([1.0, float(2 * (i % 4 == 0))]) for i in range(40)]
    alone = zero_shot.choice(scores, once)["accuracy"]
    many = zero_shot.choice(scores * 10, once * 10)["accuracy"]
    assert many.share.value == alone.share.value == 0.75
    assert many.examples is not None
    assert many.examples.shape == (40, 1, 2)
    widths = [each.share.high - each.share.low for each in (many, alone)]
    assert widths[0] == pytest.approx(widths[1], rel=0.15)
    # Of two pictures one has three questions, two of them answered.
    asked = [Question(i, ["a", "b"], [1.0, 0.0]) for i in (7, 3, 7, 7)]
    best = [np.array([1.0, 0.0])] * 3 + [np.array([0.0, 1.0])]
    found = zero_shot.choice(best, asked)["accuracy"].examples
    np.testing.assert_array_equal(found, [[[1, 1]], [[2, 3]]])


def problem(seed=0, examples=300, dim=12, classes=4):
    rng = np.random.default_rng(seed)
    features = unit(rng.normal(size=(examples, dim)))
    noisy = features @ rng.normal(size=(dim, classes)) + 0.3 * rng.normal(size=(examples, classes))
    return features, noisy.argmax(1)


@pytest.mark.parametrize("strength", [1e-4, 1e-2])
def test_the_probe_is_scikit_learns_logistic_regression(strength):
    features, labels = problem()
    found = probe.fit(features, labels, 4, strength=strength)
    exact = sklearn.linear_model.LogisticRegression(
        C=1 / (strength * len(labels)), tol=1e-10, max_iter=10_000
    ).fit(features.astype(np.float64), labels)

    def probabilities(scores):
        e = np.exp(scores - scores.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)

    ours = probabilities(features @ found.weights + found.bias)
    np.testing.assert_allclose(ours, exact.predict_proba(features), atol=2e-3)


def test_the_strength_is_chosen_on_held_out_pictures():
    features, labels = problem(1)
    found = probe.fit_best(features, labels, 4)
    assert found.strength in probe.STRENGTHS
    test, truth = problem(1)
    assert (probe.ranks(found, test, truth) < 1).mean() > 0.7
    noise = np.random.default_rng(0).integers(0, 4, len(labels))
    assert probe.fit_best(features, noise, 4).strength >= 1e-3  # of noise nothing is learned
    with pytest.raises(UserError, match="at least 5"):
        probe.fit_best(features[:3], labels[:3], 4)
