# SPDX-License-Identifier: Apache-2.0
"""The release's rules for names and the position table, and the silence it keeps broken."""

import numpy as np
import pytest

from m2jax.checkpoint.convert import m2_arch, m2_layout
from m2jax.checkpoint.convert.m2_layout import POSITIONS, listed, official
from m2jax.config import UserError
from tests.checkpoint.convert import m2_files

ROWS = 3 + 16  # of the tiny model's table: a grid of 4 x 4


@pytest.fixture
def tensors():
    return m2_files.tensors()


def table(grid):
    return np.random.default_rng(1).normal(size=(3 + grid * grid, 16)).astype(np.float32)


def positions(content):
    return official(content, m2_files.MODEL, "FILE").tensors[POSITIONS]


def prefixed(tensors):
    return {f"_forward_module.{name}": tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("wrap", "layout"),
    [
        (lambda t: {"state_dict": t, "module": {}, "model": {}}, "lightning"),
        (lambda t: {"model": {}, "module": prefixed(t)}, "deepspeed"),
        (lambda t: {"module": t}, "deepspeed"),
        (lambda t: {"model": t}, "model"),
        (lambda t: t, "bare"),
        (prefixed, "deepspeed"),
    ],
)
def test_every_layout_gives_the_same_tensors(tensors, wrap, layout):
    found = official(wrap(tensors), m2_files.MODEL, "FILE")
    assert found.layout == layout
    assert set(found.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert found.tensors[name] is tensor or name == POSITIONS
        np.testing.assert_array_equal(found.tensors[name], tensor)
    assert (found.dropped, found.missing) == ([], [])


@pytest.mark.parametrize("grid", [2, 3, 6])
def test_a_table_of_another_grid(tensors, grid):
    tensors[POSITIONS] = table(grid)
    averaged = m2_layout.interpolate(tensors[POSITIONS], ROWS)
    assert averaged.shape == (ROWS, 16)
    lightning = averaged if grid < 4 else tensors[POSITIONS][:ROWS]
    np.testing.assert_array_equal(positions({"state_dict": tensors}), lightning)
    np.testing.assert_array_equal(positions({"module": prefixed(tensors)}), averaged)
    np.testing.assert_array_equal(positions(prefixed(tensors)), averaged)
    for content in ({"module": tensors}, {"model": tensors}, tensors):  # no rule for these
        with pytest.raises(
            UserError, match=rf"A.weight is \[{3 + grid**2}, 16\] but .* \[19, 16\]"
        ):
            positions(content)


def test_interpolation_averages_areas():
    grid = np.arange(16, dtype=np.float32).reshape(16, 1)
    small = m2_layout.interpolate(np.concatenate([np.full((3, 1), 9, np.float32), grid]), 3 + 4)
    np.testing.assert_array_equal(small[:, 0], [9, 9, 9, 2.5, 4.5, 10.5, 12.5])
    half = m2_layout.interpolate(small.astype(np.float16), 3 + 9)
    assert half.dtype == np.float16
    np.testing.assert_array_equal(half[3:6, 0], [2.5, 3.5, 4.5])  # the middle bin covers both


@pytest.mark.parametrize(("have", "want"), [(3 + 15, ROWS), (3, ROWS), (0, ROWS), (ROWS, 3 + 5)])
def test_a_table_that_is_no_grid_is_refused(have, want):
    with pytest.raises(UserError, match=f"{have} rows do not fit {want}"):
        m2_layout.interpolate(np.zeros((have, 4), np.float32), want)


def test_the_visual_tokenizer_is_no_part_of_the_model(tensors):
    extra = {"visual_tokenizer.encoder.weight": np.zeros(2, np.float32)}
    found = official({"state_dict": tensors | extra}, m2_files.MODEL, "FILE")
    assert found.dropped == list(extra)
    deepspeed = {"module": prefixed(tensors | extra)}  # where the release keeps it, unexpected
    with pytest.raises(UserError, match=r"1 left over .visual_tokenizer.encoder.weight"):
        official(deepspeed, m2_files.MODEL, "FILE")
    allowed = official(deepspeed, m2_files.MODEL, "FILE", ["visual_tokenizer.*"])
    assert allowed.dropped == list(extra)


def test_missing_and_left_over_names_are_errors_unless_allowed(tensors):
    del tensors["pooler.dense.bias"], tensors["norm.weight"]
    tensors["mlm_head.bias"] = tensors["norm.bias"]
    match = r"2 missing \(norm.weight, pooler.dense.bias\) and 1 left over \(mlm_head.bias\)"
    with pytest.raises(UserError, match=match):
        official(tensors, m2_files.MODEL, "FILE")
    with pytest.raises(UserError, match=r"1 missing \(norm.weight\): "):
        official(tensors, m2_files.MODEL, "FILE", ["pooler.dense.bias", "mlm_*"])
    found = official(tensors, m2_files.MODEL, "FILE", ["pooler.*", "norm.weight", "mlm_head.bias"])
    assert found.missing == ["norm.weight", "pooler.dense.bias"]
    assert found.dropped == ["mlm_head.bias"]


def test_another_size_is_refused(tensors):
    with pytest.raises(UserError, match="480 missing") as caught:
        official(tensors_of("m2-encoder-0.4b"), m2_arch.read("m2-encoder-10b").model, "FILE")
    assert "backbone.encoder.layers.{9-20}.ffn.A.fc1.bias" in str(caught.value)
    wide = tensors | {m2_files.LAYER: np.zeros((64, 17), np.float32)}
    with pytest.raises(UserError, match=r"fc1.weight is \[64, 17\] but .* has \[64, 16\]"):
        official(wide, m2_files.MODEL, "FILE")
    flat = tensors | {POSITIONS: np.array(3, np.float32)}
    with pytest.raises(UserError, match=r"A.weight is \[\] but"):
        official({"state_dict": flat}, m2_files.MODEL, "FILE")


def tensors_of(name):
    """Tensors of a published size that take no memory."""
    shapes = m2_layout.shapes(m2_arch.read(name).model)
    return {n: np.broadcast_to(np.float32(0), shape) for n, shape in shapes.items()}


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": [1]},
        {"state_dict": {"a": 3}},
        {"epoch": 3},
        {3: np.zeros(2)},
        {"module": {"a": np.zeros(1), "_forward_module.a": np.zeros(1)}},
    ],
)
def test_other_contents_are_refused(content):
    with pytest.raises(
        UserError, match=r"FILE.*: (holds no named|.* is no tensor|a is there with)"
    ):
        official(content, m2_files.MODEL, "FILE")


def test_names_are_listed_in_short():
    names = [f"b.layers.{i}.w" for i in (0, 1, 2, 5)] + ["x", "b.layers.7.v"]
    assert listed(names) == "b.layers.{0-2,5}.w, x, b.layers.7.v"
