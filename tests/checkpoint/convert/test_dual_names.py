# SPDX-License-Identifier: Apache-2.0
"""Every parameter has one place in each layout, and comes back from it bit for bit."""

import dataclasses

import numpy as np
import pytest

from m2jax.checkpoint.convert import dual_tensors
from m2jax.checkpoint.convert.dual_names import LAYOUTS, slots
from m2jax.config import UserError
from m2jax.config_dual import FAMILIES
from m2jax.models import params as params_lib
from tests.models.dual_toys import TOYS, placed, random_params

CASES = [(family, layout) for family in FAMILIES for layout in LAYOUTS]


def exported(family, layout):
    return dict(dual_tensors.Release(random_params(TOYS[family]), TOYS[family], layout))


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_every_layer_of_every_parameter_has_exactly_one_place(family, layout):
    cfg = TOYS[family]
    places = [
        (name, slot.layer) for slot in slots(cfg, layout).values() for name in slot.rule.names
    ]
    wanted = []
    for row in params_lib.table(params_lib.abstract(cfg)):
        layers = range(row.shape[0]) if ".blocks." in row.name else [None]
        wanted += [(row.name, layer) for layer in layers]
    assert sorted(places, key=str) == sorted(wanted, key=str)


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_out_and_in_again_is_the_same_to_the_bit(family, layout):
    cfg = TOYS[family]
    tensors = exported(family, layout)
    assert {name: x.shape for name, x in tensors.items()} == dual_tensors.shapes(cfg, layout)
    back = params_lib.flatten(placed(tensors, cfg, layout))
    for name, array in params_lib.flatten(random_params(cfg)).items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)
        assert back[name].dtype == array.dtype


@pytest.mark.parametrize("family", FAMILIES)
def test_optional_parts_are_left_out_of_the_table(family):
    cfg = TOYS[family]
    vision = dataclasses.replace(cfg.vision, pre_norm=not cfg.vision.pre_norm)
    other = dataclasses.replace(cfg, vision=vision)
    changed = set(slots(cfg, "hf")) ^ set(slots(other, "hf"))
    assert changed == {f"vision_model.pre_layrnorm.{part}" for part in ("weight", "bias")}


def test_half_precision_files_become_float32_exactly():
    tensors = {name: x.astype(np.float16) for name, x in exported("clip", "hf").items()}
    params = placed(tensors, TOYS["clip"], "hf")
    kernel = params["vision"]["head"]["kernel"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel, tensors["visual_projection.weight"].T.astype(np.float32))


def test_buffers_and_poolers_that_nothing_reads_are_passed_over():
    tensors = exported("chinese-clip", "hf")
    tensors["text_model.embeddings.position_ids"] = np.arange(10)[None]
    tensors["text_model.pooler.dense.weight"] = np.zeros((32, 32), np.float32)
    placed(tensors, TOYS["chinese-clip"], "hf")


def missing(tensors):
    del tensors["visual_projection.weight"]


def left_over(tensors):
    tensors["text_model.adapter.weight"] = np.zeros(3)


def transposed(tensors):
    tensors["text_projection.weight"] = tensors["text_projection.weight"].T


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (missing, "missing visual_projection.weight: "),
        (left_over, "left over text_model.adapter.weight: "),
        (transposed, r"text_projection.weight \(32, 24\): the config asks for \(24, 32\)"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(spoil, words):
    tensors = exported("clip", "hf")
    spoil(tensors)
    with pytest.raises(UserError, match=words) as caught:
        placed(tensors, TOYS["clip"], "hf", "w.safetensors")
    assert str(caught.value).startswith("w.safetensors: ")
    assert "\n" not in str(caught.value)


def test_nan_is_refused_by_name():
    tensors = exported("clip", "hf")
    tensors["logit_scale"] = np.float32(np.nan)
    with pytest.raises(UserError, match="logit_scale: holds NaN"):
        placed(tensors, TOYS["clip"], "hf")


def test_many_wrong_names_are_counted():
    with pytest.raises(UserError, match=r"missing .* and \d+ more; left over .* and \d+ more"):
        placed(exported("clip", "hf"), TOYS["clip"], "open-clip")
