# SPDX-License-Identifier: Apache-2.0
"""What surrounds SPD's detector equals the published code: masks, patches, squares, boxes."""

import re

import numpy as np
import pytest

from m2jax.tasks.video import patches
from tests.golden import fixtures

AREA = "video"
CLOSE = 1e-4
PIXELS = 640
RAW = re.compile(r"(.+)__(conf([\d.]+))__raw_pred")


def is_expected(file):
    """Patches and boxes by the name of a map."""
    values = fixtures.values(file)
    return isinstance(values, dict) and any(
        isinstance(own, dict) and "patch_shapes" in own for own in values.values()
    )


def is_arrays(file):
    """Masked maps by name."""
    return any(key.endswith("__masked") for key in fixtures.keys(file))


EXPECTED = fixtures.cases(AREA, "patches of similarity maps", is_expected)


def arrays_beside(file, test):
    """All arrays of the files beside that pass a test."""
    found = {}
    for other in sorted(file.parent.iterdir()):
        if test(other):
            found |= fixtures.arrays(other)
    return found


def of_name(name, known):
    """The map of a case: a stored one, or zeros of the size that its name says."""
    if name in known:
        return known[name]
    size = re.search(r"(\d+)x(\d+)$", name)
    if not size or "zeros" not in name:
        pytest.fail(f"no map of {name}")
    return np.zeros((int(size[1]), int(size[2])), np.float32)


def maps_of(file, names):
    return arrays_beside(file, lambda other: bool(fixtures.keys(other) & set(names)))


@pytest.mark.parametrize("file", EXPECTED)
def test_masks_patches_and_squares(file):
    expected, golden = fixtures.values(file), arrays_beside(file, is_arrays)
    known = maps_of(file, expected)
    for name, own in expected.items():
        before = of_name(name, known).copy()
        masked = patches.mask(of_name(name, known))
        np.testing.assert_array_equal(of_name(name, known), before)
        cut = list(patches.split(masked))
        if "starts" not in own:  # nothing to see; there the published code raises, or gives []
            assert cut == []
            assert own.get("boxes", []) == []
            continue
        np.testing.assert_array_equal(masked, golden[f"{name}__masked"])
        assert [[p.reference, p.query] for p in cut] == own["starts"]  # there (x, y)
        assert [list(p.values.shape) for p in cut] == own["patch_shapes"]
        for number, (patch, sums) in enumerate(zip(cut, own["letterbox_checksums"], strict=True)):
            square = patches.letterbox(patch.values, PIXELS)
            assert list(square.shape) == sums["shape"][:2]
            wanted = golden[f"{name}__patch{number}__lb_stride8"]
            np.testing.assert_allclose(square[4::8, 4::8], wanted, atol=CLOSE)
            np.testing.assert_allclose(square.max(), sums["max"], atol=CLOSE)
            total = square.sum(dtype=np.float64) * sums["shape"][2]
            np.testing.assert_allclose(total, sums["sum"], rtol=1e-6)


@pytest.mark.parametrize("file", EXPECTED)
def test_boxes(file):
    expected, golden = fixtures.values(file), arrays_beside(file, is_arrays)
    known = maps_of(file, expected)
    done = 0
    for key in golden:
        if not (case := RAW.fullmatch(key)):
            continue
        name, wanted = case[1], expected[case[1]][f"boxes_{case[2]}"]
        cut = list(patches.split(patches.mask(known[name])))
        found = []
        for patch, raw in zip(cut, golden[key], strict=True):
            where = patches.fit(*patch.values.shape, PIXELS)
            seen = patches.select(raw, where, conf=float(case[3]), nms=0.3)
            assert (np.diff(seen.scores) <= 0).all()
            found += patches.whole(seen, patch).tolist()
        assert found == wanted, key
        done += 1
    assert done == sum(key.startswith("boxes_conf") for own in expected.values() for key in own)
