# SPDX-License-Identifier: Apache-2.0
"""Fusion with metadata and the steps after the classifier, against the public code."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from m2jax.eval import multilabel
from m2jax.losses import longtail
from m2jax.tasks.longtail import fusion, postprocess
from tests.golden import fixtures

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def is_fusion(file):
    keys = fixtures.keys(file)
    return {"x", "meta", "fused"} <= keys and "fm__conv1.weight" in keys


def is_merging(file):
    return {"logits", "class_counts", "obs_id", "allowed_mask", "obs_pred"} <= fixtures.keys(file)


FUSIONS = fixtures.cases("downstream", "fusion with metadata", is_fusion)
MERGINGS = fixtures.cases("downstream", "merging of observations", is_merging)


class Tensors:
    """Torch's tensors of a fixture as our parameters."""

    def __init__(self, golden):
        self.golden = golden

    def linear(self, name):
        found = {"kernel": jnp.asarray(self.golden[f"{name}.weight"].T)}
        if f"{name}.bias" in self.golden:
            found["bias"] = jnp.asarray(self.golden[f"{name}.bias"])
        return found

    def norm(self, name):
        return {
            "scale": jnp.asarray(self.golden[f"{name}.weight"]),
            "bias": jnp.asarray(self.golden[f"{name}.bias"]),
        }

    def numbers(self, pattern):
        """The numbers that a pattern finds in the names, in order."""
        found = (re.match(pattern, key) for key in self.golden)
        return sorted({int(match.group(1)) for match in found if match})

    def dynamic(self, number):
        stem = f"fm__conv2.{number}.dynamic_conv"
        return {
            "image1": self.linear(f"{stem}.conv11.conv.0"),
            "image2": self.linear(f"{stem}.conv12"),
            "weight1": self.linear(f"{stem}.conv21.conv.0"),
            "weight2": self.linear(f"{stem}.conv22"),
            "norm": self.norm(f"{stem}.br.0"),
            "last": self.linear(f"{stem}.conv3.conv.0"),
            "last_norm": self.norm(f"{stem}.conv3.conv.ln"),
        }


@pytest.mark.parametrize("case", FUSIONS)
def test_fusion_with_metadata(case):
    golden = fixtures.arrays(case)
    tensors = Tensors(golden)
    blocks = [
        {name: tensors.linear(f"loc__feats.{n}.{name}") for name in ("w1", "w2")}
        for n in tensors.numbers(r"loc__feats\.(\d+)\.w1\.weight")
    ]
    encoder = {"first": tensors.linear("loc__feats.0"), "blocks": blocks}
    encoded = fusion.encode_side(encoder, jnp.asarray(golden["meta"]))
    side = fusion.linear(tensors.linear("loc__class_emb"), encoded)
    np.testing.assert_allclose(side, golden["loc_emb"], **TOLERANCE)
    layers = tensors.numbers(r"fm__conv2\.(\d+)\.dynamic_conv\.conv12\.weight")
    params = {
        "inward": tensors.linear("fm__conv1"),
        "layers": [tensors.dynamic(n) for n in layers],
        "outward": tensors.linear("fm__conv3"),
        "norm": tensors.norm("fm__norm3"),
    }
    fused = fusion.fuse(params, jnp.asarray(golden["x"]), jnp.asarray(golden["loc_emb"]))
    np.testing.assert_allclose(fused, golden["fused"], **TOLERANCE)
    block = {
        **{name: tensors.linear(f"res__{name}") for name in ("w1", "w2")},
        **{f"norm{n}": tensors.norm(f"res__norm_fn{n}") for n in (1, 2)},
    }
    found = fusion.residual_norm(block, jnp.asarray(golden["res_in"]))
    np.testing.assert_allclose(found, golden["res_out"], **TOLERANCE)


@pytest.mark.parametrize("case", MERGINGS)
def test_from_logits_to_observations(case):
    golden = fixtures.arrays(case)
    prior = np.asarray(longtail.log_prior(golden["class_counts"], 1.0), np.float64)
    scores = postprocess.probabilities(golden["logits"], float(golden["tau"]) * prior)
    # The code's number is given per observation, whose ids count from 0 or are looked up.
    order = {obs: n for n, obs in enumerate(np.unique(golden["obs_id"]))}
    codes = golden["obs_code_idx"]
    by_id = len(codes) > len(order)
    places = np.array([codes[obs if by_id else order[obs]] for obs in golden["obs_id"]])
    kept = postprocess.filtered(scores, places, golden["allowed_mask"] != 0)
    found = postprocess.merged(kept, golden["obs_id"])
    np.testing.assert_array_equal(found.ids, golden["obs_sorted"])
    np.testing.assert_array_equal(found.classes, golden["obs_pred"])
    np.testing.assert_allclose(found.scores, golden["obs_score"], rtol=1e-5)
    truth = golden["obs_true_synth"]
    np.testing.assert_allclose(
        multilabel.macro_f1(found.classes, truth), golden["macro_f1"], atol=1e-6
    )
    every = multilabel.macro_f1(found.classes, truth, len(golden["class_counts"]))
    np.testing.assert_allclose(every, golden["macro_f1_all_classes"], atol=1e-6)
    assert (found.classes == truth).mean() == pytest.approx(float(golden["accuracy"]))
