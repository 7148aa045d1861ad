# SPDX-License-Identifier: Apache-2.0
"""Metrics of retrieval and re-identification against the published scripts' numbers."""

import numpy as np
import pytest

from m2jax.tasks import ranking
from m2jax.tasks.ranking import FeatureScores, MatrixScores, rows_of
from m2jax.tasks.reid import metrics as reid
from m2jax.tasks.reid.rerank import Settings, rerank
from m2jax.tasks.retrieval import metrics
from m2jax.tasks.retrieval.compatibility import Measured, compatibility
from tests.golden import fixtures

METRIC = 1e-6
AREA = "downstream"


def is_revisited(file):
    return {"ranks", "easy_hard_junk_mask", "map_M"} <= fixtures.keys(file)


def is_gldv2(file):
    return {"ranked", "gt_mask", "k", "mAP"} <= fixtures.keys(file)


def is_reid(file):
    return {"qf", "gf", "distmat", "q_pids", "cmc"} <= fixtures.keys(file)


def is_rerank(file):
    keys = fixtures.keys(file)
    return {"qf", "gf", "dist", "cmc"} <= keys and "distmat" not in keys


def is_compatibility(file):
    found = fixtures.values(file)
    return isinstance(found, dict) and "P_up" in str(found.get("formula")) and "rows" in found


def close(found, wanted, limit=METRIC):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=limit, equal_nan=True)


@pytest.mark.parametrize("case", fixtures.cases(AREA, "revisited map", is_revisited))
def test_revisited(case):
    golden = fixtures.arrays(case)
    truth = metrics.Truth(*(rows_of(mask) for mask in golden["easy_hard_junk_mask"]))
    names = {"E": "easy", "M": "medium", "H": "hard"}
    assert set(names) == {key[-1] for key in golden if key.startswith("map_")}

    def in_lists(right, ignored):
        return ranking.hits_in_lists(golden["ranks"].T, right, ignored)

    def in_scores(right, ignored):
        distances = np.argsort(golden["ranks"].T, axis=1).astype(np.float32)
        return ranking.hits(MatrixScores(distances), right, ignored, tile=7, rows=4)

    for rank in (in_lists, in_scores):
        found = metrics.revisited(truth, rank)
        for letter, name in names.items():
            close(found[name].mean_ap, golden[f"map_{letter}"])
            close(found[name].ap, golden[f"aps_{letter}"])
            close(found[name].mean_precision, golden[f"mpr_{letter}"])
            close(found[name].precision, golden[f"prs_{letter}"])


@pytest.mark.parametrize("case", fixtures.cases(AREA, "GLDv2 map", is_gldv2))
def test_gldv2(case):
    golden = fixtures.arrays(case)
    hits = ranking.hits_in_lists(golden["ranked"], rows_of(golden["gt_mask"]))
    found = metrics.mean_ap_at(hits, int(golden["k"]))
    close(found.mean_ap, golden["mAP"])
    close(found.ap, golden["aps"])


def labels(golden, side):
    return reid.Labels(golden[f"{side}_pids"], golden[f"{side}_camids"])


@pytest.mark.parametrize("case", fixtures.cases(AREA, "re-ID metrics", is_reid))
def test_cmc_and_map(case):
    golden = fixtures.arrays(case)
    top = len(golden["cmc"])
    for scores in (
        MatrixScores(golden["distmat"]),
        FeatureScores(golden["qf"], golden["gf"]),  # its distances are of unit rows
    ):
        found = reid.evaluate(scores, labels(golden, "q"), labels(golden, "g"), top=top)
        close(found.mean_ap, golden["mAP"])
        close(found.cmc, golden["cmc"])


def labels_of(case):
    """Labels of a file with the same features, where one lies beside it."""
    golden = fixtures.arrays(case)
    for file in sorted(case.parent.iterdir()):
        if is_reid(file):
            other = fixtures.arrays(file)
            shapes = [other["qf"].shape, other["gf"].shape]
            if shapes == [golden["qf"].shape, golden["gf"].shape]:
                unit = other["qf"] / np.linalg.norm(other["qf"], axis=1, keepdims=True)
                if np.allclose(unit, golden["qf"], atol=1e-6):
                    return other
    return None


@pytest.mark.parametrize("case", fixtures.cases(AREA, "re-ranked distances", is_rerank))
def test_rerank(case):
    golden = fixtures.arrays(case)
    for tile in (17, 8192):
        close(rerank(golden["qf"], golden["gf"], tile=tile), golden["dist"])
    exact = rerank(golden["qf"], golden["gf"], Settings(half=False))
    close(exact, golden["dist"], 5e-3)  # what float16 costs the published code
    other = labels_of(case)
    if other is not None:
        found = reid.evaluate(
            MatrixScores(rerank(golden["qf"], golden["gf"])),
            labels(other, "q"),
            labels(other, "g"),
            top=len(golden["cmc"]),
        )
        close(found.mean_ap, golden["mAP"])
        close(found.cmc, golden["cmc"])


@pytest.mark.parametrize("case", fixtures.cases(AREA, "compatibility scores", is_compatibility))
def test_compatibility(case):
    for row in fixtures.values(case)["rows"]:
        parts = zip(row["old_self"], row["self"], row["cross"], row["star_self"], strict=True)
        found = compatibility(dict(zip(row["order"], (Measured(*p) for p in parts), strict=True)))
        close(found, [row["P_up"], row["P_comp"], row["P_1"]], 1e-9)
