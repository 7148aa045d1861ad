# SPDX-License-Identifier: Apache-2.0
"""Maps and segments equal those of the published code, their order included."""

import re

import numpy as np
import pytest

from m2jax.tasks.video import align, dynamic, maps, warping
from tests.golden import fixtures

AREA = "video"
CLOSE = 1e-5
SUMS = re.compile(r"(.+)__(.+)__dp")
PATH = re.compile(r"(.+)__dtw_path")


def is_alignment(file):
    """Segments by method, settings and map."""
    values = fixtures.values(file)
    return isinstance(values, dict) and {"methods", "maps"} <= set(values)


def is_intermediate(file):
    """Sums of dynamic programming and warping paths."""
    return any(SUMS.fullmatch(key) or PATH.fullmatch(key) for key in fixtures.keys(file))


def is_construction(file):
    """Features and the maps made of them."""
    return any(re.fullmatch(r".+_(raw|chamfer)", key) for key in fixtures.keys(file))


ALIGNMENTS = fixtures.cases(AREA, "alignments", is_alignment)
INTERMEDIATES = fixtures.cases(AREA, "alignment intermediates", is_intermediate)
CONSTRUCTIONS = fixtures.cases(AREA, "similarity maps of features", is_construction)


def similarity(folder, document):
    """The maps that alignments are of: the file that holds all of their names."""
    for file in sorted(folder.glob("*.npz")):
        if any(name in document["maps"] for name in fixtures.keys(file)):
            return {k: v for k, v in fixtures.arrays(file).items() if k in document["maps"]}
    pytest.skip(f"{folder} holds no maps")


def runs(document):
    for method, settings in document["methods"].items():
        for name, run in settings.items():
            yield method, name, run


@pytest.mark.parametrize("file", ALIGNMENTS)
def test_segments_one_by_one_and_all_at_once(file):
    document = fixtures.values(file)
    known = similarity(file.parent, document)
    for method, name, run in runs(document):
        aligner = align.with_settings(method, run["params"])
        names = [n for n in run["expected"] if n in known]
        ties = {n for n in names if method == "TN" and document["maps"][n].get("tie_sensitive")}
        before = {n: known[n].copy() for n in names}
        together = align.align(aligner, [known[n] for n in names])
        for n, found in zip(names, together, strict=True):
            np.testing.assert_array_equal(known[n], before[n])  # inputs stay as they are
            if n not in ties:
                assert found.tolist() == run["expected"][n], (method, name, n)
            if len(known[n]) < 60:
                (alone,) = align.align(aligner, [known[n]])
                assert alone.tolist() == found.tolist(), (method, name, n)


@pytest.mark.parametrize("file", INTERMEDIATES)
def test_sums_and_paths(file):
    golden = fixtures.arrays(file)
    (document,) = [fixtures.values(f) for f in file.parent.glob("*.json") if is_alignment(f)]
    known = similarity(file.parent, document)
    for key in golden:
        if found := SUMS.fullmatch(key):
            settings = document["methods"]["DP"][found[2]]["params"]
            chosen = {k: settings[k] for k in ("min_sim", "discontinue")}
            sums = dynamic.accumulate(known[found[1]][None] + 1, **chosen)
            stem = key.removesuffix("dp")
            np.testing.assert_array_equal(sums.best[0], golden[key])
            np.testing.assert_array_equal(sums.unmatched[0], golden[f"{stem}unmatch"])
            np.testing.assert_array_equal(sums.came[0], golden[f"{stem}back"])
        elif found := PATH.fullmatch(key):
            (path,) = warping.warping_paths([known[found[1]]])
            np.testing.assert_array_equal(path, golden[key])


@pytest.mark.parametrize("file", CONSTRUCTIONS)
def test_maps_of_features(file):
    golden = fixtures.arrays(file)
    for stem in sorted({key.rsplit("_", 1)[0] for key in golden}):
        query, reference = golden[f"{stem}_q"], golden[f"{stem}_r"]
        if f"{stem}_raw" in golden:
            found = {
                "raw": maps.cosine(query, reference),
                "norm": maps.cosine(query, reference, normalise=True),
            }
        else:
            found = {
                "chamfer": maps.chamfer(query, reference, scaled=False),
                "out": maps.chamfer(query, reference),
            }
        for name, value in found.items():
            if f"{stem}_{name}" in golden:
                np.testing.assert_allclose(value, golden[f"{stem}_{name}"], atol=CLOSE)
