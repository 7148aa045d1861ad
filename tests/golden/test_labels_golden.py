# SPDX-License-Identifier: Apache-2.0
"""Multi-label losses and figures, long-tail and contrastive losses, against the published code."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2jax.eval import multilabel as figures
from m2jax.losses import longtail, multilabel, selfsup
from m2jax.tasks.labels import adapter, prompt_tuning
from tests.golden import fixtures

LOSS, GRADIENT, METRIC = {"rtol": 1e-5, "atol": 1e-5}, {"rtol": 1e-4, "atol": 1e-5}, 1e-6


def with_keys(*names):
    return lambda file: set(names) <= fixtures.keys(file)


def is_losses(file):
    keys = fixtures.keys(file)
    return {"logits", "targets"} <= keys and any(k.startswith(("asl_", "rank_s")) for k in keys)


MULTILABEL = fixtures.cases("downstream", "multi-label losses", is_losses)
MAPS = fixtures.cases("downstream", "multi-label mAP", with_keys("scores", "targets", "mAP", "ap"))
TAILS = fixtures.cases(
    "downstream", "long-tail losses", with_keys("counts", "logits", "targets", "soft_targets")
)
VIEWS = fixtures.cases("downstream", "contrast of views", with_keys("feat", "pair_ids"))


def asymmetric(key):
    """``asl_sum_g4_1_c05`` and the like: reduction, focusing powers, clip in hundredths."""
    way, negative, positive, clip = re.match(
        r"(?:asl|asl_opt|tai_asl)_(sum|mean)_g(\d+)_(\d+)_c(\d+)", key
    ).groups()
    return lambda x, y: multilabel.asymmetric_loss(
        x,
        y,
        gamma_negative=float(negative),
        gamma_positive=float(positive),
        clip=int(clip) / 100,
        focus_gradient="fullgrad" in key,
        reduction=way,
    )


def loss_of(key):
    """The function that a key of the fixture is a value of; ``None`` where it is of none."""
    if "asl_" in key:
        return asymmetric(key)
    if key == "tai_dualcoop_perB":  # the same focus as TaI-DPT's, summed over labels
        return lambda x, y: multilabel.asymmetric_loss(x, y, reduction="batch")
    if found := re.match(r"rank_s(\d+)_m(\d+)$", key):
        scale, margin = map(float, found.groups())
        return lambda x, y: multilabel.ranking_loss(x, y, scale=scale, margin=margin)
    return multilabel.binary_cross_entropy if key == "bce_mean" else None


@pytest.mark.parametrize("case", MULTILABEL)
def test_multilabel_losses_and_their_gradients(case):
    golden = fixtures.arrays(case)
    x, y = jnp.asarray(golden["logits"]), jnp.asarray(golden["targets"])
    names = [k for k in golden if k not in ("logits", "targets") and not k.endswith("_grad")]
    assert names
    for name in names:
        loss = loss_of(name)
        assert loss is not None, name
        value, gradient = jax.value_and_grad(lambda z, f=loss: f(z, y))(x)
        np.testing.assert_allclose(value, golden[name], rtol=2e-5, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(gradient, golden[f"{name}_grad"], **GRADIENT, err_msg=name)


@pytest.mark.parametrize("case", MAPS)
def test_mean_average_precision(case):
    golden = fixtures.arrays(case)
    found = figures.mean_ap(golden["scores"], golden["targets"])
    np.testing.assert_allclose(100 * found.map, golden["mAP"], atol=METRIC)
    each = golden["ap"] / (100 if golden["ap"].max() > 1 else 1)
    np.testing.assert_allclose(found.per_class, each, atol=METRIC)


@pytest.mark.parametrize("case", TAILS)
def test_longtail_losses(case):
    golden = fixtures.arrays(case)
    x, counts = jnp.asarray(golden["logits"]), jnp.asarray(golden["counts"])
    hard, soft = jnp.asarray(golden["targets"]), jnp.asarray(golden["soft_targets"])
    for key in (k for k in golden if k.startswith("adj_tau")):
        tau = float(key.removeprefix("adj_tau"))
        prior = longtail.log_prior(counts, tau)
        np.testing.assert_allclose(prior, golden[key], **LOSS)
        plain = longtail.cross_entropy(x, hard, prior).mean()
        np.testing.assert_allclose(plain, golden[f"train_ce_tau{tau}"], **LOSS)
        best = longtail.posthoc(x, counts, tau).argmax(-1)
        np.testing.assert_array_equal(best, golden[f"posthoc_pred_tau{tau}"])

        def mined(z, a=prior):
            return longtail.hardest(longtail.cross_entropy(z, soft, a), 0.7)

        value, gradient = jax.value_and_grad(mined)(x)
        np.testing.assert_allclose(value, golden[f"ohem_la_tau{tau}"], **LOSS)
        np.testing.assert_allclose(gradient, golden[f"ohem_la_tau{tau}_grad"], **GRADIENT)
    effective = longtail.effective_log_prior(counts)
    np.testing.assert_allclose(effective, golden["elal_adjustment"], **LOSS)
    others = {
        "ohem_ce": longtail.hardest(longtail.cross_entropy(x, soft), 0.7),
        "seesaw_p0p8": longtail.seesaw(x, hard, counts, p=0.8).mean(),
        "poly_eps1": longtail.poly1(x, hard).mean(),
        "elal_loss": longtail.cross_entropy(x, soft, effective).mean(),
    }
    for key, value in others.items():
        np.testing.assert_allclose(value, golden[key], **LOSS, err_msg=key)


@pytest.mark.parametrize("case", VIEWS)
def test_contrast_of_two_views(case):
    golden = fixtures.arrays(case)
    pair = jnp.asarray(golden["pair_ids"])

    def both(x):
        return selfsup.info_nce(x, pair) + selfsup.hardest_negative(x, pair)

    value, gradient = jax.value_and_grad(both)(jnp.asarray(golden["feat"]))
    np.testing.assert_allclose(value, golden["infonce_plus_triplet"], **LOSS)
    np.testing.assert_allclose(gradient, golden["grad"], **GRADIENT)
    alone = selfsup.info_nce(jnp.asarray(golden["feat"]), pair)
    np.testing.assert_allclose(alone, golden["infonce_only"], **LOSS)
    moco = selfsup.moco_v3(
        jnp.asarray(golden["moco_q"]),
        jnp.asarray(golden["moco_k"]),
        temperature=float(golden["moco_T"]),
    )
    np.testing.assert_allclose(moco, golden["moco_loss"], **LOSS)


ADAPTERS = fixtures.cases(
    "downstream", "text adapter", with_keys("text", "noise", "sigma", "W1", "W2", "targets")
)


@pytest.mark.parametrize("case", ADAPTERS)
def test_the_adapter_on_noise_that_is_given(case, monkeypatch):
    golden = fixtures.arrays(case)
    w1, w2 = jnp.asarray(golden["W1"]), jnp.asarray(golden["W2"])
    params = {"w1": w1, "b1": jnp.zeros(w1.shape[1]), "w2": w2, "b2": jnp.zeros(w2.shape[1])}
    monkeypatch.setattr(jax.random, "normal", lambda rng, shape: jnp.asarray(golden["noise"]))
    for name in ("raw", "norm"):
        text = jnp.asarray(golden["text"])
        settings = adapter.Settings(
            sigma=float(golden["sigma"]), normalize="l2" if name == "norm" else "none"
        )
        rows = adapter.unit(text) if name == "norm" else text
        seen = adapter.perturbed(rows, jax.random.key(0), settings)
        found = adapter.scores(params, seen, settings)
        np.testing.assert_allclose(found, golden[f"logits_{name}"], **LOSS)
        for loss, key in (("ranking", "rank"), ("asymmetric", "asl")):
            value = adapter.LOSSES[loss](found, jnp.asarray(golden["targets"]))
            np.testing.assert_allclose(value, golden[f"{key}_{name}"], **LOSS)


AGGREGATES = fixtures.cases(
    "downstream", "global and local logits", with_keys("local_feats", "logits_local", "merged")
)


@pytest.mark.parametrize("case", AGGREGATES)
def test_global_and_local_logits(case):
    golden = {name: jnp.asarray(value) for name, value in fixtures.arrays(case).items()}
    each = adapter.unit(golden["local_feats"].swapaxes(0, 1))
    tokens = prompt_tuning.Tokens(
        adapter.unit(golden["global_feats"]), each, jnp.ones(each.shape[:2], bool)
    )
    prompts = prompt_tuning.Prompts(
        adapter.unit(golden["global_text"]), adapter.unit(golden["local_text"])
    )
    pair = prompt_tuning.aggregate(tokens, prompts, prompt_tuning.IMAGE_TEMPERATURE)
    np.testing.assert_allclose(pair[0], golden["logits_global"], **LOSS)
    np.testing.assert_allclose(pair[1], golden["logits_local"], **LOSS)
    np.testing.assert_allclose((pair[0] + pair[1]) / 2, golden["merged"], **LOSS)
