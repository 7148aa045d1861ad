# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2jax.config import UserError
from m2jax.tasks.ranking import FeatureScores, MatrixScores
from m2jax.tasks.reid.metrics import Labels, evaluate
from m2jax.tasks.reid.rerank import Settings, rerank


def published(distances, queries, gallery):
    """mAP and CMC query by query, in the words of the definition."""
    aps, curves = [], []
    for row, pid, cam in zip(distances, *queries, strict=True):
        order = np.argsort(row, kind="stable")
        keep = (gallery.identities[order] != pid) | (gallery.cameras[order] != cam)
        match = gallery.identities[order][keep] == pid
        if not match.any():
            continue
        precision = np.cumsum(match) / (np.arange(len(match)) + 1)
        aps.append((precision * match).sum() / match.sum())
        curve = np.minimum(np.cumsum(match), 1)
        curves.append(np.pad(curve, (0, len(row) - len(curve)), constant_values=1))
    return np.mean(aps), np.mean(curves, axis=0)


def some_labels(rng, n, identities=6, cameras=3):
    return Labels(rng.integers(0, identities, n), rng.integers(0, cameras, n))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_as_defined(seed):
    rng = np.random.default_rng(seed)
    queries, gallery = some_labels(rng, 7), some_labels(rng, 40)
    distances = rng.permutation(7 * 40).reshape(7, 40).astype(np.float32)
    found = evaluate(MatrixScores(distances), queries, gallery, top=40)
    mean_ap, cmc = published(distances, queries, gallery)
    assert found.mean_ap == pytest.approx(mean_ap, abs=1e-12)
    np.testing.assert_allclose(found.cmc, cmc)


def test_the_own_camera_and_only_it_is_removed():
    """The nearest is the query's own camera's; a distractor of no identity stays."""
    queries = Labels(np.array([1]), np.array([0]))
    gallery = Labels(np.array([1, -1, 1, 1]), np.array([0, 0, 0, 1]))
    found = evaluate(MatrixScores(np.array([[0.0, 1, 2, 3]])), queries, gallery, top=3)
    assert found.mean_ap == 0.5
    assert found.cmc.tolist() == [0, 1, 1]


def test_labels_that_do_not_fit():
    one = Labels(np.array([1]), np.array([0]))
    with pytest.raises(UserError, match="gallery: 2 images, 1 identities"):
        evaluate(MatrixScores(np.zeros((1, 2))), one, one)
    with pytest.raises(UserError, match="no query has a match"):
        evaluate(MatrixScores(np.zeros((1, 1))), one, one)


def clustered(seed, classes=5, each=8, dim=16):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, dim))
    labels = np.repeat(np.arange(classes), each)
    features = centres[labels] + 0.6 * rng.normal(size=(classes * each, dim))
    return (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32), labels


def dense(q, g, k1, k2, weight):
    """The method over whole matrices, set by set."""
    x = np.concatenate([q, g]).astype(np.float64)
    d = np.square(x[:, None] - x).sum(-1)
    d = d / d.max(1, keepdims=True)
    near = np.argsort(d, axis=1, kind="stable")

    def mutual(i, k):
        return {j for j in near[i, : k + 1] if i in near[j, : k + 1]}

    v = np.zeros_like(d)
    for i in range(len(x)):
        own = mutual(i, k1)
        wide = set(own)
        for j in own:
            theirs = mutual(j, int(np.around(k1 / 2)))
            if len(theirs & own) > 2 / 3 * len(theirs):
                wide |= theirs
        wide = sorted(wide)
        v[i, wide] = np.exp(-d[i, wide]) / np.exp(-d[i, wide]).sum()
    v = np.stack([v[near[i, :k2]].mean(0) for i in range(len(x))])
    low = np.minimum(v[: len(q), None], v[None, len(q) :]).sum(-1)
    return (1 - low / (2 - low)) * (1 - weight) + d[: len(q), len(q) :] * weight


@pytest.mark.parametrize(("k1", "k2"), [(20, 6), (5, 1), (3, 2), (60, 9)])
def test_reranking_is_that_of_whole_matrices(k1, k2):
    features, _ = clustered(3)
    q, g = features[::4], np.delete(features, np.s_[::4], axis=0)
    found = rerank(q, g, Settings(k1, k2, 0.3, half=False), tile=11)
    np.testing.assert_allclose(found, dense(q, g, k1, k2, 0.3), atol=2e-6)


def test_reranking_helps_clusters():
    features, labels = clustered(0)
    q, g = features[::4], np.delete(features, np.s_[::4], axis=0)
    queries = Labels(labels[::4], np.zeros(len(q), int))
    gallery = Labels(np.delete(labels, np.s_[::4]), np.ones(len(g), int))
    plain = evaluate(FeatureScores(q, g), queries, gallery).mean_ap
    better = evaluate(MatrixScores(rerank(q, g, Settings(7, 3, 0.3))), queries, gallery).mean_ap
    assert better > plain


@pytest.mark.parametrize("bad", [Settings(k1=0), Settings(k2=0), Settings(weight=1.5)])
def test_settings_that_mean_nothing(bad):
    with pytest.raises(UserError, match="re-ranking"):
        rerank(np.ones((1, 2)), np.ones((2, 2)), bad)
