# SPDX-License-Identifier: Apache-2.0
"""The adapter on made-up features: noise, training, thresholds, folders."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2jax.config import UserError
from m2jax.eval import multilabel
from m2jax.tasks.labels import adapter, saved, thresholds, train, vocabulary
from m2jax.tasks.labels.adapter import Settings
from m2jax.tasks.labels.grammar import Sentence

CLASSES, DIM = 12, 32
SETTINGS = Settings(normalize="l2", epochs=1, least_steps=300, batch=64, learning_rate=3e-3)
SHORT = dataclasses.replace(SETTINGS, epochs=2, least_steps=0)


@pytest.fixture(scope="module")
def world():
    """Sentences of 1 to 3 labels whose features are the labels' directions; images lie apart."""
    rng = np.random.default_rng(0)
    axes = rng.normal(size=(CLASSES, DIM))
    axes /= np.linalg.norm(axes, axis=1, keepdims=True)
    labels = [tuple(rng.permutation(CLASSES)[: rng.integers(1, 4)].tolist()) for _ in range(400)]
    rows = np.stack([axes[list(each)].sum(0) for each in labels])
    rows += 0.1 * rng.normal(size=rows.shape)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    gap = rng.normal(size=DIM) * 0.08
    return axes.astype(np.float32), labels, rows.astype(np.float32), gap.astype(np.float32)


@pytest.mark.parametrize("noise", ["gaussian", "uniform", "sphere"])
def test_noise_of_every_law_has_the_size_it_says_and_is_fresh(noise):
    made = Settings(noise=noise, sigma=0.1)
    rows = jnp.zeros((400, 50))
    first, second = (adapter.perturbed(rows, jax.random.key(k), made, 3.0) for k in (0, 1))
    np.testing.assert_allclose(np.asarray(first).std(), 0.3, rtol=0.02)
    assert np.abs(first - second).min(axis=1).max() > 0
    if noise == "sphere":
        np.testing.assert_allclose(np.linalg.norm(first, axis=1), 0.3 * 50**0.5, rtol=1e-4)
    if noise == "uniform":
        assert np.abs(first).max() <= 0.3 * 3**0.5 + 1e-5


def test_noise_can_be_off_and_unit_rows_can_be_kept():
    rows = adapter.unit(jnp.asarray(np.random.default_rng(0).normal(size=(4, 8))))
    off = adapter.perturbed(rows, jax.random.key(0), Settings(sigma=0.0))
    np.testing.assert_array_equal(off, rows)
    kept = adapter.perturbed(
        rows, jax.random.key(0), Settings(normalize="l2", sigma=0.3, renormalize=True)
    )
    np.testing.assert_allclose(np.linalg.norm(kept, axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("loss", ["ranking", "asymmetric", "bce"])
def test_each_loss_learns_to_find_all_labels_of_images_it_never_saw(world, loss):
    axes, labels, rows, gap = world
    trained = adapter.train(
        rows[:300], labels[:300], CLASSES, dataclasses.replace(SETTINGS, loss=loss), axes
    )
    assert trained.losses[-1] < 0.6 * trained.losses[0]
    images = rows[300:] + gap
    found = train.scored(trained.params, images, SETTINGS, axes)
    shown = train.shown_matrix(labels[300:], CLASSES)
    assert multilabel.mean_ap(found, shown).map > 0.9


def test_training_repeats_itself_and_follows_the_seed(world):
    axes, labels, rows, _ = world
    first, again = (adapter.train(rows, labels, CLASSES, SHORT, axes) for _ in range(2))
    other = adapter.train(rows, labels, CLASSES, dataclasses.replace(SHORT, seed=1), axes)
    np.testing.assert_array_equal(first.params["w1"], again.params["w1"])
    assert np.abs(first.params["w1"] - other.params["w1"]).max() > 1e-3


def test_an_untrained_residual_adapter_is_zero_shot_and_a_trained_one_takes_new_labels(world):
    axes, labels, rows, gap = world
    made = dataclasses.replace(SETTINGS, kind="residual")
    start = adapter.initialise(jax.random.key(0), DIM, CLASSES, made)
    cosines = adapter.COSINE_SCALE * rows @ axes.T
    found = adapter.scores(start, jnp.asarray(rows), made, jnp.asarray(axes))
    np.testing.assert_allclose(found, cosines, atol=1e-5)
    held = [9, 10, 11]  # in no training sentence
    keep = [i for i, each in enumerate(labels) if not set(each) & set(held)]
    trained = adapter.train(rows[keep], [labels[i] for i in keep], CLASSES - 3, made, axes[:9])
    every = train.scored(trained.params, rows + gap, made, axes)
    shown = train.shown_matrix(labels, CLASSES)
    assert every.shape == shown.shape
    assert multilabel.mean_ap(every[:, held], shown[:, held]).map > 0.6


def test_targets_are_spread_out_of_lists():
    padded = adapter.padded_labels([(0,), (1, 3), ()], 4)
    np.testing.assert_array_equal(
        adapter.targets(jnp.asarray(padded), 4), [[1, 0, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]]
    )
    with pytest.raises(UserError, match="beyond 4 classes"):
        adapter.padded_labels([(5,)], 4)


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("kind", "deep", "kind='deep': use one of mlp, residual"),
        ("noise", "pink", "use one of gaussian"),
        ("loss", "hinge", "use one of ranking"),
        ("epochs", 0, "epochs=0: must be at least 1"),
        ("share", 1.0, "below 1"),
        ("sigma", -1.0, "not below 0"),
        ("sigma", float("nan"), "finite"),
        ("learning_rate", float("inf"), "finite"),
        ("seed", -1, "seed=-1: must be at least 0"),
        ("seed", 2**70, "below 2.31"),
    ],
)
def test_settings_that_cannot_be_are_refused(field, value, match):
    with pytest.raises(UserError, match=match):
        Settings(**{field: value})


def test_a_loss_that_is_no_number_is_said(world):
    axes, labels, rows, _ = world
    broken = np.where(np.arange(len(rows))[:, None] == 3, np.nan, rows)
    with pytest.raises(UserError, match="the loss is no number"):
        adapter.train(broken, labels, CLASSES, SHORT, axes)


def test_the_best_threshold_is_the_best_of_all():
    rng = np.random.default_rng(1)
    scores, shown = rng.normal(size=(60, 4)), rng.random((60, 4)) < 0.3
    scores[:, 2] = np.round(scores[:, 2])  # ties
    scores += shown
    shown[:, 3] = False
    found = thresholds.best(scores, shown)
    for label in range(3):

        def f1(limit, label=label):
            return multilabel.f1(scores[:, [label]] > limit, shown[:, [label]]).of1

        limits = [*scores[:, label], scores[:, label].min() - 1]
        assert f1(found[label]) == pytest.approx(max(map(f1, limits)))
    assert found[3] == pytest.approx(np.median(found[:3]))


def test_a_threshold_parts_scores_that_lie_side_by_side():
    for high in np.float32(np.random.default_rng(0).uniform(1, 100, 50)):
        low = np.nextafter(high, np.float32(0))
        scores = np.array([[high]] * 3 + [[low]] * 2)
        found = thresholds.best(scores, scores == high)
        np.testing.assert_array_equal(scores > found, scores == high)
        everything = thresholds.best(scores, np.ones_like(scores, bool))
        assert (scores > everything).all()


def test_labels_named_too_rarely_share_one_threshold():
    scores = np.random.default_rng(0).normal(size=(40, 60)).astype(np.float32)
    shown = np.zeros((40, 60), bool)
    shown[np.arange(40), np.arange(40)] = True
    scores[shown] += 9
    found = thresholds.best(scores, shown)
    assert len(set(found.tolist())) == 1
    np.testing.assert_array_equal(scores > found, shown)  # the middle of all scores takes half


def test_a_figure_of_thresholds_is_of_sentences_that_did_not_set_them():
    rng = np.random.default_rng(2)
    scores, shown = rng.normal(size=(40, 200)), rng.random((40, 200)) < 0.1  # nothing to find
    fitted = multilabel.f1(scores > thresholds.best(scores, shown), shown).of1
    found = multilabel.f1(thresholds.crossed(scores, shown), shown).of1
    assert fitted > 0.24
    assert found < 0.2  # of all labels everywhere it is 0.18
    expected = scores[:20] > thresholds.best(scores[20:], shown[20:])
    np.testing.assert_array_equal(thresholds.crossed(scores, shown)[:20], expected)
    assert thresholds.crossed(scores[:1], shown[:1]).shape == (1, 200)


@pytest.fixture
def made(world):
    axes, labels, rows, _ = world
    words = vocabulary.checked([{"en": [f"thing {i}"]} for i in range(CLASSES)])
    sentences = [Sentence(str(each), each, "en") for each in labels]
    texts = train.Texts(sentences, rows, labels)
    return train.fitted(texts, words, axes, SHORT, {"sentences": 400}, languages=["en"], model="x")


def test_a_folder_gives_back_what_was_written_and_is_whole_or_absent(made, tmp_path, monkeypatch):
    saved.write(tmp_path / "a", made)
    found = saved.read(tmp_path / "a")
    assert found.vocabulary == made.vocabulary
    assert (found.settings, found.model, found.report) == (made.settings, "x", made.report)
    for name in saved.NAMES:
        np.testing.assert_array_equal(found.params[name], made.params[name])
    np.testing.assert_array_equal(found.thresholds, made.thresholds)
    with pytest.raises(UserError, match="exists already"):
        saved.write(tmp_path / "a", made)
    monkeypatch.setattr(saved.part_folder.os, "rename", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        saved.write(tmp_path / "b", made)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_damaged_folder_is_one_line(made, tmp_path):
    with pytest.raises(UserError, match="name a folder made by labels train"):
        saved.read(tmp_path / "none")
    saved.write(tmp_path / "a", made)
    file = tmp_path / "a" / saved.LAYOUT.card
    card = json.loads(file.read_text())
    for change, match in (
        ("{", "damaged"),
        ("[]", "another format"),
        (json.dumps(card | {"format": 9}), "another format"),
        (json.dumps(card | {"settings": {"depth": 3}}), "damaged"),
        (json.dumps(card | {"labels": card["labels"][:4]}), "does not fit its adapter.json"),
        (json.dumps(card | {"labels": card["labels"][:-1] + card["labels"][:1]}), "too: remove"),
    ):
        file.write_text(change)
        with pytest.raises(UserError, match=match) as error:
            saved.read(tmp_path / "a")
        assert "\n" not in str(error.value)
    header = b'{"w1":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}}'
    for content in (b"x" * 20, len(header).to_bytes(8, "little") + header + b"\0\0"):
        (tmp_path / "a" / saved.LAYOUT.weights).write_bytes(content)
        with pytest.raises(UserError, match="damaged"):
            saved.read(tmp_path / "a")


def test_the_report_of_a_training_tells_held_out_figures(made, world):
    assert made.report["held_out_sentences"] == 40
    assert 0 <= made.report["text_of1"] <= 1
    assert 0 < made.report["text_map"] <= 1
    held = [world[1][i] for i in train._split(400, SHORT.seed)[1]]
    named = train.shown_matrix(held, CLASSES).sum(axis=0)
    assert made.report["own_thresholds"] == (named >= thresholds.FEWEST).sum()
    assert made.thresholds.shape == (CLASSES,)
