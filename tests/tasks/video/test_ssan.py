# SPDX-License-Identifier: Apache-2.0
"""Detector and keyframes: compiled parts equal the plain ones, gradients arrive, it learns."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from m2jax.config import UserError
from m2jax.tasks.video import examples, keyframes, patches, pattern, saved, ssan
from m2jax.tasks.video.detector import STRIDES, Detector, places

SMALL = {"size": 32, "width": 4, "steps": 2, "batch": 2, "simulated": 1.0}


def features(seed, *shape):
    x = np.random.default_rng(seed).normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize(("rows", "columns"), [(40, 40), (25, 60), (60, 31), (7, 9), (64, 64)])
def test_squares_of_a_batch_equal_the_plain_ones(rows, columns):
    rng = np.random.default_rng(rows)
    values = np.zeros((2, 64, 64), np.float32)
    values[0, :rows, :columns] = rng.random((rows, columns)) - 0.2
    values[1] = rng.random((64, 64))
    masked = np.array(ssan._masked(jnp.array(values)))
    for own, (n, m) in zip(range(2), ((rows, columns), (64, 64)), strict=True):
        expected = patches.mask(values[own, :n, :m])
        np.testing.assert_allclose(masked[own, :n, :m], expected)
        assert (masked[own, n:] == 0).all()
        assert (masked[own, :, m:] == 0).all()
    counts = jnp.array([[rows, 64], [columns, 64]], jnp.float32)
    squares, scale, offset = ssan._squares(jnp.array(masked), *counts, 96)
    for own, (n, m) in zip(range(2), ((rows, columns), (64, 64)), strict=True):
        plain = patches.letterbox(masked[own, :n, :m], 96)
        np.testing.assert_allclose(squares[own], plain, atol=1e-5)
        where = patches.fit(n, m, 96)
        np.testing.assert_allclose(scale[own], where.scale, rtol=1e-6)
        np.testing.assert_allclose(offset[own], [where.left, where.top], atol=1e-4)


@pytest.mark.parametrize("learned", [False, True])
def test_keyframes_of_a_batch_equal_the_plain_ones(learned):
    x, lengths, window = features(0, 3, 24, 8), np.array([24, 17, 3]), 4
    for row, length in enumerate(lengths):
        x[row, length:] = 0
    scorer = None
    if learned:
        scorer = keyframes.Scorer(8, 4, 4, rngs=nnx.Rngs(0))
        scorer.second.kernel[...] = jax.random.normal(jax.random.key(1), (3, 4, 1))
    seen = np.zeros((3, 24), bool)
    found = ssan._keep(scorer, jnp.array(x), jnp.array(lengths), x, seen, window, None)
    for row, length in enumerate(lengths.tolist()):
        if scorer is None:
            kept = keyframes.uniform(length, window)
        else:
            kept = keyframes.highest(np.array(scorer(jnp.array(x)))[row, :length], window)
        assert found.number[row] == len(kept)
        np.testing.assert_allclose(found.features[row, : len(kept)], x[row, kept], atol=1e-6)
        assert (np.abs(found.features[row, len(kept) :]) < 1e-6).all()
        edges = keyframes.edges(kept, length)
        np.testing.assert_allclose(found.edges[row, : len(edges)], edges)
        times = jnp.array([[[0.0, length], [1.5, length - 0.5]]])
        one = ssan.Kept(*(part[row : row + 1] for part in found[:3]), found.loss)
        back = np.interp(np.array(ssan._counted(times, one)), np.arange(len(edges)), edges)
        np.testing.assert_allclose(back, times, atol=1e-4)


def batch_of(seed=0, dim=8):
    rng = np.random.default_rng(seed)
    return examples.batch(None, rng, size=4, frames=64, dim=dim, share=1.0)


@pytest.mark.slow
def test_the_detectors_loss_reaches_the_extractor_and_only_when_together():
    settings = ssan.Settings(kind="ssan", window=4, ske_weight=0.0, **SMALL)
    detector, scorer = ssan.new_detector(settings), ssan.new_scorer(settings, 8)
    scorer.second.kernel[...] = 0.1 * jax.random.normal(jax.random.key(1), (3, ssan.HIDDEN, 1))
    graph, state = nnx.split(scorer)

    def total(state, weight):
        own = dataclasses.replace(settings, ske_weight=weight)
        found = ssan.losses(detector, nnx.merge(graph, state), batch_of(), jax.random.key(0), own)
        return found.total, found

    size = {}
    for weight in (0.0, 1.0):
        gradient, found = jax.grad(total, has_aux=True)(state, weight)
        size[weight] = sum(float(jnp.abs(x).sum()) for x in jax.tree.leaves(gradient))
        assert found.ske > 0
    assert size[0.0] > 1e-3  # through the choice alone
    assert size[1.0] != size[0.0]


@pytest.mark.slow  # three trainings are compiled
def test_a_detector_on_frozen_keyframes_leaves_them():
    ske = ssan.train(None, ssan.Settings(kind="ske", window=4, **SMALL), dim=8)
    assert ske.detector is None
    together = ssan.train(None, ssan.Settings(kind="ssan", window=4, **SMALL), dim=8, start=ske)
    alone = ssan.train(None, ssan.Settings(kind="spd", window=4, **SMALL), dim=8, start=ske)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), alone.scorer, ske.scorer)
    moved = jax.tree.map(lambda a, b: bool((a == b).all()), together.scorer, ske.scorer)
    assert all(jax.tree.leaves(same))
    assert not all(jax.tree.leaves(moved))
    with pytest.raises(UserError, match="trained with window 4, not 2"):
        ssan.train(None, ssan.Settings(kind="ssan", window=2, **SMALL), dim=8, start=ske)
    with pytest.raises(UserError, match="takes features of 8 numbers, not 16"):
        ssan.train(None, ssan.Settings(kind="ssan", window=4, **SMALL), dim=16, start=ske)


def test_trainings_repeat():
    settings = ssan.Settings(kind="ssan", window=4, **SMALL)
    one, two = (ssan.train(None, settings, dim=8) for _ in range(2))
    other = ssan.train(None, dataclasses.replace(settings, seed=1), dim=8)
    assert one.report == two.report != other.report


def test_places_are_centres_of_their_cells():
    where = places(64)
    assert len(where.centres) == sum((64 // s) ** 2 for s in STRIDES)
    assert where.centres[:2].tolist() == [[2, 2], [6, 2]]
    assert where.centres[-1].tolist() == [56, 56]
    detector = Detector(64, 4, rngs=nnx.Rngs(0))
    squares = jnp.zeros((2, 64, 64))
    seen = detector(squares)
    assert seen.logits.shape == (2, len(where.centres))
    middle = (seen.boxes[..., :2] + seen.boxes[..., 2:]) / 2
    np.testing.assert_allclose(middle[0], where.centres, atol=1e-3)  # nothing is seen in zeros
    np.testing.assert_allclose(seen.boxes[0, :, 2] - seen.boxes[0, :, 0], 8 * where.strides)


@pytest.mark.slow
def test_it_learns_to_find_copies():
    """In 20 s, from simulated sequences alone; so short a training stays below the classical TN."""
    from m2jax.tasks.video import align, protocol

    settings = ssan.Settings(size=64, width=8, steps=300, batch=16, simulated=1.0)
    part = ssan.train(None, settings, dim=32)
    fresh = ssan.train(None, dataclasses.replace(settings, steps=1), dim=32)
    assert part.report["last"]["total"] < 0.75 * part.report["first"]["total"]
    rng = np.random.default_rng(99)
    pairs = [examples.simulated(rng, 32, frames=64) for _ in range(100)]
    maps = [pair.query @ pair.reference.T for pair in pairs]
    labels = {str(n): pair.boxes.tolist() for n, pair in enumerate(pairs) if len(pair.boxes)}
    figures = {}
    for name, trained in (("trained", part), ("fresh", fresh)):
        method = pattern.Spd(trained, conf=0.3)
        found = align.align(method, maps, end_exclusive=True)
        named = {str(n): own.tolist() for n, own in enumerate(found)}
        figures[name] = protocol.evaluate(labels, named)["f1"]
    assert figures["trained"] > 0.3 > 3 * figures["fresh"], figures


@pytest.fixture(scope="module")
def part():
    return ssan.train(None, ssan.Settings(kind="ssan", window=4, **SMALL), dim=8, model="abc")


def test_parts_come_back_from_their_folder(part, tmp_path):
    saved.write(tmp_path / "p", part)
    found = saved.read(tmp_path / "p")
    assert found.settings == part.settings
    assert (found.dim, found.model, found.report) == (part.dim, "abc", part.report)
    pairs = [(features(1, 60, 8), features(2, 50, 8))]
    one, two = (
        pattern.spans_of_features(pattern.Spd(p, conf=0.005), pattern.Keyframes(p), pairs)
        for p in (part, found)
    )
    assert len(one[0])
    np.testing.assert_array_equal(one[0], two[0])
    assert saved.fingerprint(part, 1.0) == saved.fingerprint(found, 1.0)
    assert saved.fingerprint(part, 1.0) != saved.fingerprint(found, 0.9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": {"size": 33}}, "multiple of 16"),
        ({"settings": {"nonsense": 1}}, "another version of m2jax \\(has the setting nonsense"),
        ({"settings": 5}, "damaged"),
        ({"settings": [{}]}, "damaged"),
        ({"parts": []}, r"parts \[\]"),
        ({"parts": ["detector", "other"]}, "other"),
        ({"parts": ["detector"]}, "another version of m2jax \\(has scorer"),
        ({"dim": 16}, "does not fit"),
        ({"dim": -1}, "dim -1"),
        ({"settings": {"size": 32, "width": 8}}, "does not fit"),
    ],
)
def test_damaged_folders_are_refused(part, tmp_path, change, message):
    import json

    saved.write(tmp_path / "p", part)
    card = json.loads((tmp_path / "p" / "video.json").read_text())
    (tmp_path / "p" / "video.json").write_text(json.dumps(card | change))
    with pytest.raises(UserError, match=message):
        saved.read(tmp_path / "p")


def test_a_folder_of_another_version_is_not_called_damaged(part, tmp_path):
    """Extractors had no ``place`` at first."""
    saved.write(tmp_path / "p", part)
    file = tmp_path / "p" / "video.safetensors"
    tensors = load_file(file)
    del tensors["scorer.place"]
    save_file(tensors, file)
    message = r"p: made by another version of m2jax \(lacks scorer\.place\): train it anew"
    with pytest.raises(UserError, match=message):
        saved.read(tmp_path / "p")


def test_values_that_are_no_numbers_are_refused(part, tmp_path):
    bad = jax.tree.map(lambda x: x.at[...].set(jnp.nan), part.detector)
    saved.write(tmp_path / "p", dataclasses.replace(part, detector=bad))
    with pytest.raises(UserError, match="is not finite"):
        saved.read(tmp_path / "p")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "ske"}, "window=1"),
        ({"kind": "other"}, "use spd, ske or ssan"),
        ({"size": 40}, "multiple of 16"),
        ({"width": 6}, "multiple of 4"),
        ({"steps": 0}, "at least 1"),
        ({"simulated": 1.5}, "choose 0 to 1"),
        ({"learning_rate": float("nan")}, "above 0"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        ssan.Settings(**settings)
