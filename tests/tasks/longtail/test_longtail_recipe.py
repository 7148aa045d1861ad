# SPDX-License-Identifier: Apache-2.0
"""Each setting does what its name says: losses, schedules, views, what follows the classifier."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from m2jax.eval import multilabel
from m2jax.eval.sets.records import Made
from m2jax.losses import longtail
from m2jax.tasks.longtail import fusion, model, page, recipe, table, views
from m2jax.tasks.longtail.model import Data, Settings
from m2jax.tasks.longtail.postprocess import Observations
from m2jax.tasks.longtail.saved import Saved
from m2jax.tasks.longtail.table import Row

COUNTS = np.array([60, 30, 8, 2])
CODES = table.Codes(tuple("abcd"), {"code": ("X",), "country": ("P", "Q"), "endemic": ()})


def side_of(country):
    return {"code": "X", "country": country, "endemic": ""}


def rows_of(*observations):
    return [Row(Path(f"{n}.png"), each, side_of("P"), "a") for n, each in enumerate(observations)]


def classifier(bias, counts=COUNTS, **settings):
    """One whose logits are the same for every image."""
    made = Settings(**{"side": "none", "loss": "plain", **settings})
    params = {
        "head": {"kernel": np.zeros((3, len(bias))), "bias": np.asarray(bias)},
        "norm": {"scale": np.ones(3), "bias": np.zeros(3)},
    }
    return Saved(CODES, made, params, counts, np.ones((1, len(bias)), bool), "m")


@pytest.mark.parametrize(
    ("settings", "prior"),
    [
        ({"loss": "plain"}, np.zeros(4)),
        ({"loss": "plain", "tau": 0.5}, np.zeros(4)),
        ({"loss": "adjusted"}, np.log(COUNTS / 100)),
        ({"loss": "adjusted", "tau": 0.5}, np.log(COUNTS / 100) / 2),
        ({"loss": "effective"}, np.log(1 - 0.999999**COUNTS) - np.log(1 - 0.999999**100)),
    ],
)
def test_a_loss_adds_the_prior_of_its_name_to_smoothed_labels(settings, prior):
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(6, 4)), np.array([0, 1, 2, 3, 0, 2])
    z = x + prior
    logs = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    expected = -0.8 * logs[np.arange(6), labels] - 0.2 * logs.mean(axis=1)
    made = Settings(**settings, smoothing=0.2)
    found = model.losses_of(jnp.asarray(x), jnp.asarray(labels), jnp.asarray(COUNTS), made)
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_seesaw_and_poly_are_the_ones_that_are_named():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)
    labels, counts = jnp.array([0, 1, 2, 3, 0, 2]), jnp.asarray(COUNTS)
    for name, expected in (
        ("seesaw", longtail.seesaw(x, labels, counts)),
        ("poly", longtail.poly1(x, labels)),
    ):
        found = model.losses_of(x, labels, counts, Settings(loss=name))
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_metadata_hides_from_all_at_first_to_few_at_last_and_the_hardest_count(monkeypatch):
    shares, kept = [], []
    drop, hardest = fusion.drop_side, longtail.hardest

    def dropped(side, share, rng):
        shares.append(float(share))
        return drop(side, share, rng)

    def hard(losses, keep):
        kept.append((losses.shape[0], keep))
        return hardest(losses, keep)

    monkeypatch.setattr(fusion, "drop_side", dropped)
    monkeypatch.setattr(longtail, "hardest", hard)
    data = Data(np.eye(5, 3, dtype=np.float32), np.ones((5, 2), np.float32), np.arange(5) % 2)
    with jax.disable_jit():
        model.train(data, 2, Settings(side="none", epochs=4, batch=5, keep=0.6))
        assert shares == [1.0, 0.75, 0.5, 0.25]
        assert set(kept) == {(5, 0.6)}
        model.train(data, 2, Settings(side="none", epochs=1, batch=5, drop_side=False))
    assert len(shares) == len(kept) == 4


def test_rare_classes_are_repeated_in_training_and_keep_their_prior(monkeypatch):
    seen = {}

    def caught(rng, features, side, labels, counts, *rest):
        seen.update(labels=np.asarray(labels), counts=np.asarray(counts), features=features)
        return {}, np.zeros(1)

    monkeypatch.setattr(model, "_train", caught)
    labels = np.repeat(np.arange(4), COUNTS)
    data = Data(labels[:, None] + np.zeros((100, 3)), np.zeros((100, 2)), labels)
    model.train(data, 5, Settings(side="none", oversample=True))
    assert np.bincount(seen["labels"]).tolist() == [60, 30, 8, 10]
    assert seen["counts"].tolist() == [60, 30, 8, 2, 1]  # as counted; of none: one
    np.testing.assert_array_equal(seen["features"][:, 0], seen["labels"])
    model.train(data, 5, Settings(side="none"))
    assert len(seen["labels"]) == 100


def test_every_view_keeps_its_images_class_and_metadata(monkeypatch):
    seen = {}

    def caught(data, classes, settings, pairs=None):
        seen.update(data=data, classes=classes)
        return {}

    monkeypatch.setattr(model, "train", caught)
    rows = [Row(Path("a"), "1", side_of("P"), "c"), Row(Path("b"), "2", side_of("Q"), "a")]
    features = np.array([[[1.0], [1.5]], [[2.0], [2.5]]])
    found = recipe.fitted(features, CODES, rows, Settings(), model="m")
    assert seen["data"].features[:, 0].tolist() == [1.0, 1.5, 2.0, 2.5]
    assert seen["data"].labels.tolist() == [2, 2, 0, 0]
    assert seen["data"].side.tolist() == [[1, 1, 0]] * 2 + [[1, 0, 1]] * 2
    assert found.counts.tolist() == [1, 0, 1, 0]  # images, not views
    assert found.allowed.tolist() == [[True, False, True, False]]


def test_the_views_of_an_image_stay_together_in_every_batch():
    class Mean:
        def preprocess(self, images):
            return np.stack([np.asarray(image.resize((2, 2))) for image in images])

        def encode_image(self, pixels):
            return pixels.mean(axis=(1, 2))

    pictures = Made(5, lambda n: Image.new("RGB", (12, 8), (10 * n, 0, 0)))
    kinds = views.Views((1.0, 2.0), "five", True)
    for batch in (1, 40, 999):
        found = views.view_features(Mean(), pictures, kinds, length=False, batch=batch)
        assert found.shape == (5, 20, 3)
        np.testing.assert_array_equal(found[..., 0], 10.0 * np.arange(5)[:, None] + np.zeros(20))


def test_five_crops_are_the_centre_and_the_four_corners():
    image = Image.fromarray(np.arange(8 * 12, dtype=np.uint8).reshape(8, 12))
    made = [np.asarray(v) for v in views.views(image, views.Views((2.0,), "five", False))]
    assert [v.shape for v in made] == [(4, 4)] * 5
    corners = [(int(v[0, 0]) // 12, int(v[0, 0]) % 12) for v in made]
    assert corners == [(2, 4), (0, 0), (0, 8), (4, 0), (4, 8)]


def test_shares_of_classes_are_taken_off_after_training():
    bias = np.array([1.0, 0.5, 0.0, -0.5])
    z = bias - 0.7 * np.log(COUNTS / 100)
    rows = rows_of("1", "2")
    seen = np.zeros((2, 3, 3), np.float32)
    found = recipe.scored(classifier(bias), seen, rows, recipe.Steps(tau=0.7))
    np.testing.assert_allclose(found, [np.exp(z) / np.exp(z).sum()] * 2, rtol=1e-5)
    alone = recipe.scored(classifier(bias), seen, rows, recipe.Steps())
    np.testing.assert_allclose(alone, [np.exp(bias) / np.exp(bias).sum()] * 2, rtol=1e-5)


@pytest.mark.parametrize(("how", "best"), [("best", 0), ("vote", 1), ("mean", 1)])
def test_observations_are_merged_as_the_steps_say(how, best):
    scores = np.array([[0.7, 0.3, 0, 0], [0.4, 0.6, 0, 0], [0.3, 0.65, 0.05, 0]])
    steps = recipe.Steps(place_filter=False, merge=how)
    found = recipe.finished(classifier(np.zeros(4)), scores, rows_of("o", "o", "o"), steps)
    assert found.observations.classes.tolist() == [best]


def test_head_medium_and_tail_are_by_images_of_training():
    counts = np.array([recipe.HEAD, recipe.HEAD - 1, recipe.TAIL, recipe.TAIL - 1])
    predicted, truth = np.array([0, 1, 1, 2, 0]), np.array([0, 1, 2, 2, 3])
    names = [str(n) for n in range(5)]
    rows = [Row(Path("x"), name, {}, "abcd"[n]) for name, n in zip(names, truth, strict=True)]
    observations = Observations(np.array(names), predicted, np.ones(5))
    result = recipe.Result(np.zeros((5, 4)), observations, {})
    found = recipe.figures(classifier(np.zeros(4), counts), result, rows)
    each = multilabel.per_class_f1(predicted, truth, 4)
    assert found["macro_f1_head"] == each[0] == pytest.approx(2 / 3)
    assert found["macro_f1_medium"] == pytest.approx(each[1:3].mean())
    assert found["macro_f1_tail"] == each[3] == 0
    assert found["accuracy"] == 0.6


def test_an_image_that_disagrees_with_its_observation_is_not_marked():
    scores = np.array([[0.7, 0.3, 0, 0], [0.4, 0.6, 0, 0]])
    rows = rows_of("o", "o")
    saved = classifier(np.zeros(4))
    result = recipe.finished(saved, scores, rows, recipe.Steps())
    content = recipe.as_json(saved, result, rows)
    pictures = Made(2, lambda n: Image.new("RGB", (4, 4)))
    text = page.of(content, pictures, rows)
    assert text.count("<li class=on>a ") == 1
    assert "<li>b " in text
