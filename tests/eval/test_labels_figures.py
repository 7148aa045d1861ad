# SPDX-License-Identifier: Apache-2.0
"""mAP, CF1, OF1 and macro-F1 against scikit-learn and plain counting."""

import numpy as np
import sklearn.metrics as reference
from hypothesis import given, settings
from hypothesis import strategies as st

from m2jax.eval import multilabel


def example(seed, images=40, classes=6):
    rng = np.random.default_rng(seed)
    truth = rng.random((images, classes)) < rng.random(classes)
    return rng.normal(size=(images, classes)) + truth, truth


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 999))
def test_map_is_scikit_learns_where_every_class_is_there(seed):
    scores, truth = example(seed)
    found = multilabel.mean_ap(scores, truth)
    for column in np.flatnonzero(truth.any(axis=0)):
        expected = reference.average_precision_score(truth[:, column], scores[:, column])
        np.testing.assert_allclose(found.per_class[column], expected, atol=1e-6)
    assert found.map == found.per_class.mean()


def test_a_class_without_images_stays_in_the_mean_and_ties_earn_nothing():
    scores, truth = example(1)
    truth[:, 0], truth[0, 1:] = False, True
    found = multilabel.mean_ap(scores, truth)
    assert found.per_class[0] == 0
    np.testing.assert_allclose(found.map, found.per_class[1:].sum() / 6)
    constant = multilabel.mean_ap(np.zeros((4, 1)), np.array([[1], [0], [0], [0]]))
    np.testing.assert_allclose(constant.map, 0.25, rtol=1e-6)


def test_classes_are_scored_alike_however_many_there_are(monkeypatch):
    scores, truth = example(2, classes=11)
    whole = multilabel.mean_ap(scores, truth)
    monkeypatch.setattr(multilabel, "COLUMNS", 3)
    np.testing.assert_array_equal(multilabel.mean_ap(scores, truth).per_class, whole.per_class)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 999))
def test_f1_is_scikit_learns(seed):
    scores, truth = example(seed)
    predicted = scores > 0.5
    found = multilabel.f1(predicted, truth)
    for average, precision, recall in (
        ("macro", found.cp, found.cr),
        ("micro", found.op, found.or_),
    ):
        options = {"average": average, "zero_division": 0}
        expected = reference.precision_score(truth, predicted, **options)
        np.testing.assert_allclose(precision, expected)
        np.testing.assert_allclose(recall, reference.recall_score(truth, predicted, **options))
    np.testing.assert_allclose(found.of1, reference.f1_score(truth, predicted, average="micro"))
    if found.cp + found.cr:
        np.testing.assert_allclose(found.cf1, 2 * found.cp * found.cr / (found.cp + found.cr))


def test_top_k_takes_so_many_of_each_image():
    scores, _ = example(3)
    chosen = multilabel.top_k(scores, 3)
    assert (chosen.sum(axis=1) == 3).all()
    assert (np.where(chosen, scores, np.inf).min(1) >= np.where(chosen, -9, scores).max(1)).all()


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 999), st.sampled_from([1, 5, 60]))  # of 60 many are missing
def test_macro_f1_in_both_conventions(seed, classes):
    rng = np.random.default_rng(seed)
    predicted, truth = (rng.integers(classes, size=30) for _ in range(2))
    union = multilabel.macro_f1(predicted, truth)
    np.testing.assert_allclose(union, reference.f1_score(truth, predicted, average="macro"))
    every = multilabel.macro_f1(predicted, truth, classes + 5)
    labels = range(classes + 5)
    options = {"average": "macro", "labels": list(labels), "zero_division": 0}
    np.testing.assert_allclose(every, reference.f1_score(truth, predicted, **options))
    assert every < union or not union
