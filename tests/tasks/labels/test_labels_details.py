# SPDX-License-Identifier: Apache-2.0
"""Each setting does what its name says: noise, shares, thresholds, names, and what is shown."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from m2jax.config import UserError
from m2jax.eval.sets.records import Labelled, Made
from m2jax.tasks.labels import (
    adapter,
    corpus,
    evaluate,
    features,
    predict,
    thresholds,
    train,
    vocabulary,
    zero_shot,
)
from m2jax.tasks.labels.adapter import Settings
from m2jax.tasks.labels.grammar import Sentence
from m2jax.tasks.labels.predict import Predicted
from m2jax.tasks.labels.saved import Saved

WORDS = vocabulary.checked([{"en": ["dog", "puppy"], "zh": ["狗"]}, {"en": ["cat"]}])


def adapter_of(words, limits, **settings):
    """An adapter whose scores are its features."""
    count = len(words)
    params = {
        "w1": np.concatenate([np.eye(count), -np.eye(count)], axis=1),
        "b1": np.zeros(2 * count),
        "w2": np.concatenate([np.eye(count), -np.eye(count)]),
        "b2": np.zeros(count),
    }
    prompts = np.eye(count)
    return Saved(words, ("en",), Settings(**settings), params, prompts, np.asarray(limits), "m")


def test_a_share_of_a_residual_adapter_is_the_adapters():
    rng = np.random.default_rng(0)
    params = {
        "w1": rng.normal(size=(4, 6)),
        "b1": rng.normal(size=6),
        "w2": rng.normal(size=(6, 4)),
        "b2": rng.normal(size=4),
    }
    rows, prompts = rng.normal(size=(3, 4)), rng.normal(size=(5, 4))
    out = np.maximum(rows @ params["w1"] + params["b1"], 0) @ params["w2"] + params["b2"]
    mixed = 0.8 * rows / np.linalg.norm(rows, axis=1, keepdims=True) + 0.2 * out
    cosines = mixed @ prompts.T / np.linalg.norm(mixed, axis=1)[:, None]
    found = adapter.scores(
        params, jnp.asarray(rows), Settings(kind="residual", share=0.2), jnp.asarray(prompts)
    )
    np.testing.assert_allclose(
        found, 4 * cosines / np.linalg.norm(prompts, axis=1), rtol=1e-4, atol=1e-5
    )


def test_every_step_of_training_sees_fresh_noise_of_the_features_length(monkeypatch):
    seen, moved = [], []
    perturbed, scores = adapter.perturbed, adapter.scores

    def noisy(rows, rng, settings, length=1.0):
        seen.append((tuple(np.asarray(jax.random.key_data(rng)).tolist()), float(length)))
        moved.append(perturbed(rows, rng, settings, length))
        return moved[-1]

    def scored(params, rows, *rest):
        assert rows is moved[-1]
        return scores(params, rows, *rest)

    monkeypatch.setattr(adapter, "perturbed", noisy)
    monkeypatch.setattr(adapter, "scores", scored)
    rows = np.array([[3.0, 4.0], [0.0, 1.0], [6.0, 8.0]], np.float32)
    with jax.disable_jit():
        adapter.train(rows, [(0,), (1,), (0,)], 2, Settings(epochs=2, least_steps=0, batch=2))
    keys, lengths = zip(*seen, strict=True)
    assert len(set(keys)) == len(keys) == 4
    np.testing.assert_allclose(lengths, 16 / 3, rtol=1e-6)


def test_thresholds_are_of_held_out_sentences_with_noise(monkeypatch):
    fixed = adapter_of(WORDS, [0, 0])
    given = []

    def caught(rows, labels, *rest):
        given.append((rows, labels))
        return adapter.Trained(fixed.params, np.ones(2))

    monkeypatch.setattr(adapter, "train", caught)
    monkeypatch.setattr(adapter, "perturbed", lambda rows, *rest: -rows)
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(80, 2)).astype(np.float32)
    labels = [tuple(np.flatnonzero(row > 0.3).tolist()) for row in rows]
    texts = train.Texts([Sentence("", each, "en") for each in labels], rows, labels)
    found = train.fitted(texts, WORDS, np.eye(2), Settings(), {}, languages=["en"], model="m")
    kept, held = train._split(80, 0)
    assert sorted([*kept, *held]) == list(range(80))
    np.testing.assert_array_equal(given[0][0], rows[kept])
    assert given[0][1] == [labels[i] for i in kept]
    shown = train.shown_matrix([labels[i] for i in held], 2)
    np.testing.assert_allclose(found.thresholds, thresholds.best(-rows[held], shown), atol=1e-6)


def test_all_labels_above_their_thresholds_are_listed_and_marked():
    words = vocabulary.checked([{"en": [name]} for name in ("a", "b", "c", "d")])
    saved = adapter_of(words, [0.5, 9, 0, 0.5])
    found = predict._of_image(saved, np.array([0.9, 0.8, 0.1, 0.2]), 2)
    assert [(each.label, each.shown) for each in found] == [("a", True), ("b", False), ("c", True)]
    text = predict.as_page(
        ["x"], Made(1, lambda n: Image.new("RGB", (4, 4))), Predicted(np.zeros((1, 4)), [found])
    )
    assert text.count("class=on") == 2
    assert "<li>b " in text
    rows = predict.as_json(["x"], Predicted(np.zeros((1, 4)), [found]))
    assert rows[0]["labels"] == ["a", "c"]


def test_a_label_that_is_known_keeps_its_threshold_among_new_ones(monkeypatch):
    known = vocabulary.checked([{"en": [name]} for name in ("a", "b", "c")])
    new = vocabulary.checked([{"en": ["x"]}, {"en": ["c"]}, {"en": ["y"]}])
    monkeypatch.setattr(vocabulary, "check_length", lambda *_: None)
    monkeypatch.setattr(zero_shot, "class_prompts", lambda *_: np.eye(3))
    saved = adapter_of(known, [1.0, 2.0, 7.0], kind="residual")
    found = predict.with_labels(None, saved, new)
    assert found.thresholds.tolist() == [2.0, 7.0, 2.0]


def test_both_is_half_of_each_scaled():
    saved = adapter_of(WORDS, [0, 0])
    saved = replace(saved, prompts=np.array([[0.0, 1.0], [1.0, 0.0]]))
    rows = np.array([[1.0, 0.0], [0.6, 0.8]])
    np.testing.assert_allclose(predict.scores(saved, rows), rows, atol=1e-6)
    np.testing.assert_allclose(predict.scores(saved, rows, "zero-shot"), rows[:, ::-1], atol=1e-6)
    np.testing.assert_allclose(
        predict.scores(saved, rows, "both"), [[0.5, 0.5], [0.7, 0.7]], atol=1e-6
    )


def test_an_evaluation_tells_the_adapter_from_zero_shot(monkeypatch):
    rows = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    monkeypatch.setattr(predict, "check_model", lambda *_: None)
    monkeypatch.setattr(features, "images", lambda *_, **__: rows)
    labels = [frozenset([0]), frozenset([0]), frozenset([1])]
    pictures = Made(3, lambda n: Image.new("RGB", (4, 4)))
    data = Labelled(pictures, labels, {"en": [("dog",), ("cat",)]}, {}, True)
    turned = np.array([[0.0, 1.0], [1.0, 0.0]])
    saved = replace(adapter_of(WORDS, [0.95, 0.5]), prompts=turned)
    found = evaluate.score(None, saved, data, name="x")
    assert found["labels/x/map"] == pytest.approx(1)
    assert found["labels/x/or"] == pytest.approx(2 / 3)  # one of two dogs is above 0.95
    assert found["zero_shot/x/map"] == pytest.approx(((1 / 2 + 2 / 3) / 2 + 1 / 3) / 2)
    assert found["baseline/chance/x/map"] == pytest.approx(0.5)


def test_class_prompts_are_the_mean_over_all_names_templates_and_languages(monkeypatch):
    places = {}

    def texts(model, sentences, *, length):
        assert not length
        return np.eye(20)[[places.setdefault(s, len(places)) for s in sentences]]

    monkeypatch.setattr(features, "texts", texts)
    templates = {"en": ("{c}", "a {c}"), "zh": ("{c}图",)}
    found = zero_shot.class_prompts(None, WORDS, ("en", "zh"), templates=templates)
    named = [{"dog", "a dog", "puppy", "a puppy", "狗图"}, {"cat", "a cat"}]
    assert set(places) == set.union(*named)
    for row, texts_of in zip(found, named, strict=True):
        expected = np.zeros(20)
        expected[[places[text] for text in texts_of]] = len(texts_of) ** -0.5
        np.testing.assert_allclose(row, expected)


def test_sentences_that_a_model_would_read_in_part_are_left_out(monkeypatch, four_words):
    monkeypatch.setattr(vocabulary, "BATCH", 2)
    made = [
        Sentence("a dog", (0,), "en"),
        Sentence("a dog and a cat", (0, 1), "en"),  # its cat is cut off
        Sentence("one more dog", (0,), "en"),
    ]
    given = corpus.Corpus(made, {"source": "grammar", "sentences": 3, "never_named": []})
    found = corpus.uncut(four_words, WORDS, given)
    assert found.sentences == [made[0], made[2]]
    report = found.report
    assert (report["source"], report["sentences"], report["cut_off"]) == ("grammar", 2, 1)
    assert report["never_named"] == ["cat"]
    with pytest.raises(UserError, match="all are longer than the model's text"):
        corpus.uncut(four_words, WORDS, corpus.Corpus(made[1:2], {}))


def test_training_takes_no_sentence_that_the_model_would_read_in_part(monkeypatch, four_words):
    made = [Sentence(text, (0,), "en") for text in ("a dog", "a dog on a hill", "one dog")]
    monkeypatch.setattr(features, "texts", lambda model, texts, **_: np.ones((len(texts), 2)))
    monkeypatch.setattr(features, "fingerprint", lambda model: "m")
    monkeypatch.setattr(zero_shot, "class_prompts", lambda *_: np.eye(2))
    monkeypatch.setattr(train, "fitted", lambda *given, **_: given)
    given = corpus.Corpus(made, {"source": "grammar"})
    texts, _, _, _, report = train.fit(four_words, WORDS, given, ("en",), Settings())
    assert [s.text for s in texts.sentences] == ["a dog", "one dog"]
    assert len(texts.features) == len(texts.labels) == 2
    assert (report["cut_off"], report["sentences"]) == (1, 2)
